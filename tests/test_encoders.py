"""Encoders on kernels of ours, against onnxruntime; which patterns are seen, and which are not."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_encoders import VOCABULARY, encoder, tokens
from onnx_models import FLOAT, model_of
from test_native_networks import native, reference

from headrace.errors import HeadraceError
from headrace.networks.network import network_of

LAYERS = 2
OF_A_LAYER = {
    "attention_rows_f32": 1, "convolution_f32": 4, "gelu_erf_f32": 1, "layer_norm_f32": 2,
}  # fmt: skip


@pytest.mark.parametrize("spelling", ["new", "old", "sdpa", "raw", "counts"])
def test_an_encoder_gives_what_onnxruntime_gives(spelling: str) -> None:
    rng = np.random.default_rng(3)
    model = encoder(rng, spelling, layers=LAYERS)
    with network_of(model, threads=2) as network:
        for batch, count in ((1, 7), (3, 20), (1, 33)):
            inputs = tokens(rng, batch, count)
            (region,) = native(network, inputs)
            counts = Counter(one.kernel for one in region.operations)
            assert counts.pop("rows_f32_gather") == counts.pop("rows_of_mask") == 1
            assert counts == {name: n * LAYERS for name, n in OF_A_LAYER.items()}
            # Sums of up to 64 terms, through two layers that bring them back to about 1.
            found, expected = network(inputs)["y"], reference(model, inputs)["y"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5)


def test_an_embedding_in_one_operator() -> None:
    rng = np.random.default_rng(13)
    model = encoder(rng, "embedded", layers=LAYERS)
    with network_of(model, threads=2) as network:
        for batch, count in ((1, 7), (3, 20), (1, 33)):
            inputs = tokens(rng, batch, count)
            (region,) = native(network, inputs)
            counts = Counter(one.kernel for one in region.operations)
            assert counts.pop("rows_f32_gather") == 2  # words and kinds
            assert counts.pop("layer_norm_f32") == 2 * LAYERS + 1
            assert counts.pop("rows_of_mask") == 1
            assert [one.ours for one in network.plan(inputs).regions] == [True]
            found, expected = network(inputs)["y"], reference(model, inputs)["y"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5)
        for wrong in (-1, VOCABULARY):  # ids do not count from the end here
            inputs["input_ids"][0, 0] = wrong
            with pytest.raises(HeadraceError, match=str(wrong)):
                network(inputs)
            with pytest.raises(Exception, match="index"):
                reference(model, inputs)


@pytest.mark.parametrize("op", ["BiasGelu", "SkipLayerNormalization", "Attention"])
def test_biases_that_are_no_constants(op: str) -> None:
    rng = np.random.default_rng(8)
    count = 144 if op == "Attention" else 48
    held = {"w": (48, 48), "u": (48, 144), "weight": (48,)}
    constants = {n: rng.standard_normal(of).astype(np.float32) / 5 for n, of in held.items()}
    given, attributes = {
        "BiasGelu": (["p", "bias"], {}),
        "SkipLayerNormalization": (["p", "x", "weight", "", "bias"], {}),
        "Attention": (["p", "u", "bias"], {"num_heads": 3}),
    }[op]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node(op, given, ["y"], domain="com.microsoft", **attributes),
    ]
    shapes = {"x": (FLOAT, [2, 5, 48]), "bias": (FLOAT, [count])}
    model = model_of(nodes, shapes, ["y"], constants)
    for _ in range(2):
        inputs = {n: rng.standard_normal(of).astype(np.float32) for n, (_, of) in shapes.items()}
        with network_of(model, threads=1) as network:
            found, right = network(inputs)["y"], reference(model, inputs)["y"]
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=3e-5)


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    rng = np.random.default_rng(4)
    model, inputs = encoder(rng, "new"), tokens(rng, 3, 20)
    results = []
    for threads in (1, 2, 3):
        with network_of(model, threads=threads) as network:
            results.append(network(inputs)["y"])
            alone = network({name: array[:1] for name, array in inputs.items()})["y"]
            np.testing.assert_array_equal(alone, results[-1][:1])
    assert all((one == results[0]).all() for one in results)


def test_plans_share_their_weights() -> None:
    rng = np.random.default_rng(5)
    with network_of(encoder(rng, "new"), threads=1) as network:
        inputs = [tokens(rng, 1, count) for count in (5, 9)]
        (a,), (b,) = (native(network, one) for one in inputs)
        for one in inputs:
            network(one)
        large = [{w.base for w in region.weights() if w.n_bytes > 4096} for region in (a, b)]
        assert large[0] == large[1] and len(large[0]) == 4 * LAYERS + 1
        network.plan(inputs[0])
        before = network(inputs[1])["y"]
        del a
        for count in range(20, 40):  # the first plans are forgotten
            network(tokens(rng, 1, count))
        np.testing.assert_array_equal(network(inputs[1])["y"], before)


@pytest.mark.parametrize(("heads", "width"), [(5, 40), (8, 120), (3, 15)])
@pytest.mark.parametrize("spelling", ["new", "raw"])
def test_heads_that_fill_no_vector(heads: int, width: int, spelling: str) -> None:
    rng = np.random.default_rng(6)
    model = encoder(rng, spelling, heads=heads, width=width)
    found = []
    for threads in (1, 3):
        with network_of(model, threads=threads) as network:
            for batch, count in ((2, 9), (1, 32)):
                inputs = tokens(np.random.default_rng(count), batch, count)
                (region,) = native(network, inputs)
                kernels = Counter(one.kernel for one in region.operations)
                assert kernels["attention_rows_f32"] == 2
                found.append(network(inputs)["y"])
                expected = reference(model, inputs)["y"]
                np.testing.assert_allclose(found[-1], expected, rtol=1e-4, atol=3e-5)
    assert all(np.array_equal(a, b) for a, b in zip(found[:2], found[2:], strict=True))


def test_a_query_that_sees_nothing() -> None:
    rng = np.random.default_rng(7)
    inputs = tokens(rng, 2, 6)
    inputs["attention_mask"][1] = 0
    for spelling in ("new", "sdpa", "raw"):
        model = encoder(rng, spelling)
        with network_of(model, threads=1) as network:
            assert native(network, inputs)
            found, expected = network(inputs)["y"], reference(model, inputs)["y"]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("as_node", [False, True])
def test_masks_that_are_constants(as_node: bool) -> None:
    model = encoder(np.random.default_rng(9), "new")
    inputs = tokens(np.random.default_rng(9), 2, 6)
    later = numpy_helper.from_array(np.triu(np.full((6, 6), -1e4, np.float32), 1), "later")
    if as_node:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["later"], value=later))
    else:
        model.graph.initializer.append(later)
    for one in [one for one in model.graph.node if one.op_type == "Softmax"]:
        add = next(n for n in model.graph.node if one.input[0] in n.output)
        add.input[1] = "later"
    with network_of(model, threads=1) as network:
        (region,) = native(network, inputs)
        assert [one.kernel for one in region.operations].count("attention_rows_f32") == 2
        found, expected = network(inputs)["y"], reference(model, inputs)["y"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("change", ["root", "factor", "perm", "axis"])
def test_what_only_looks_like_a_pattern_is_none(change: str) -> None:
    model = encoder(np.random.default_rng(8), "new", layers=1)
    inputs = tokens(np.random.default_rng(8), 1, 16)
    nodes = model.graph.node
    if change == "root":  # of another function than GELU
        error = next(node for node in nodes if node.op_type == "Erf")
        scaled = next(node for node in nodes if node.output[0] == error.input[0])
        scaled.input[1] = _constant(model, 1.5)
    elif change == "factor":
        last = [node for node in nodes if node.op_type == "Mul"][-1]
        last.input[1] = _constant(model, 0.25)
    elif change == "perm":  # heads and tokens stay where they are: [1, 3, 16, 16] either way
        sizes = next(node for node in nodes if node.op_type == "Reshape")
        array = np.array([1, 3, 16, 16])
        sizes.input[1] = _constant(model, array)
        turned = next(node for node in nodes if node.op_type == "Transpose")
        turned.attribute[0].ints[:] = [0, 1, 2, 3]
    else:
        softmax = next(node for node in nodes if node.op_type == "Softmax")
        softmax.attribute[0].i = 2
    with network_of(model, threads=1) as network:
        counts = Counter(one.kernel for r in native(network, inputs) for one in r.operations)
        whole = counts["attention_rows_f32"] and counts["gelu_erf_f32"]
        assert not whole
        found, expected = network(inputs)["y"], reference(model, inputs)["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("role", ["three", "six", "half", "one"])
def test_constants_that_add_a_dimension(role: str) -> None:
    """A constant of one element, but of more dimensions than what it is multiplied with."""
    rng = np.random.default_rng(10)
    of = {"three": 3, "six": 6, "half": 0.5, "one": 1, "root": 2**0.5, "least": 0, "most": 6}
    constants = {n: np.float32(value) for n, value in of.items()}
    constants[role] = constants[role].reshape(1, 1, 1, 1)
    constants |= {n: rng.standard_normal((16, 16)).astype(np.float32) / 4 for n in ("w", "v")}
    text = {
        "three": "Add a three p|Clip p least most q|Mul a q r|Div r six b",
        "half": "Div a root p|Erf p q|Add q one r|Mul a r s|Mul s half b",
    }["three" if role in ("three", "six") else "half"]
    steps = [step.split() for step in ("MatMul x w a", *text.split("|"), "MatMul b v y")]
    nodes = [helper.make_node(op, names[:-1], names[-1:]) for op, *names in steps]
    read = {name for node in nodes for name in node.input}
    constants = {n: array for n, array in constants.items() if n in read}
    model = model_of(nodes, {"x": (FLOAT, [2, 5, 16])}, ["y"], constants)
    inputs = {"x": rng.standard_normal((2, 5, 16)).astype(np.float32)}
    with network_of(model, threads=1) as network:
        found, expected = network(inputs)["y"], reference(model, inputs)["y"]
    assert expected.shape == (1, 2, 5, 16)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5)


def _constant(model: Any, value: Any) -> str:
    array = np.asarray(value, np.float32 if isinstance(value, float) else np.int64)
    name = f"changed{len(model.graph.initializer)}"
    model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return name


def test_weights_that_are_computed_from_others() -> None:
    """As files have them that store 8 bits and compute in float32."""
    rng = np.random.default_rng(9)
    nodes = [
        helper.make_node("Cast", ["w8"], ["w"], to=FLOAT),
        helper.make_node("Mul", ["w", "scale"], ["scaled"]),
        helper.make_node("MatMul", ["x", "scaled"], ["y"]),
    ]
    constants = {
        "w8": rng.integers(-127, 128, (160, 160)).astype(np.int8),
        "scale": np.float32(0.01),
    }
    model = model_of(nodes, {"x": (FLOAT, [1, 5, 160])}, ["y"], constants)
    x = rng.standard_normal((1, 5, 160)).astype(np.float32)
    with network_of(model, threads=1) as network:
        assert [kind for kind, _ in network.plan({"x": x}).where()] == ["headrace"]
        found = network({"x": x})["y"]
    np.testing.assert_allclose(found, reference(model, {"x": x})["y"], atol=1e-4)


@pytest.mark.parametrize("spelling", ["operators", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"])
@pytest.mark.parametrize(("rows", "read", "made"), [(3, 48, 40), (16, 80, 64), (25, 33, 5)])
def test_products_that_are_quantised_as_they_come(
    spelling: str, rows: int, read: int, made: int
) -> None:
    rng = np.random.default_rng(rows)
    w = rng.integers(-127, 128, (read, made)).astype(np.int8)
    w[0, 0], w[-1, -1] = -127, 127
    constants = {
        "w": w, "scales": rng.uniform(0.5, 2, made).astype(np.float32) / 99,
        "zeros": np.zeros(made, np.int8), "bias": rng.standard_normal(made).astype(np.float32),
    }  # fmt: skip
    own = {"domain": "com.microsoft"}
    quantise = helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    if spelling == "operators":
        nodes = [
            quantise,
            helper.make_node("MatMulInteger", ["q", "w", "z", "zeros"], ["sums"]),
            helper.make_node("Cast", ["sums"], ["floats"], to=FLOAT),
            helper.make_node("Mul", ["s", "scales"], ["factors"]),
            helper.make_node("Mul", ["floats", "factors"], ["product"]),
            helper.make_node("Add", ["product", "bias"], ["y"]),
        ]
    elif spelling == "DynamicQuantizeMatMul":
        inputs = ["x", "w", "scales", "zeros", "bias"]
        nodes = [helper.make_node(spelling, inputs, ["y"], **own)]
    else:
        inputs = ["q", "w", "s", "scales", "z", "zeros", "bias"]
        nodes = [quantise, helper.make_node(spelling, inputs, ["y"], **own)]
    model = model_of(nodes, {"x": (FLOAT, [1, rows, read])}, ["y"], constants, opset=17)
    with network_of(model, threads=2) as network:
        for spread in (1.0, 1e-3, 0.0):
            x = (rng.standard_normal((1, rows, read)) * spread).astype(np.float32)
            assert [kind for kind, _ in network.plan({"x": x}).where()] == ["headrace"]
            found, expected = network({"x": x})["y"], reference(model, {"x": x})["y"]
            # The sums are integers; what follows is rounded once or twice.
            np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7)


def test_an_encoder_that_onnxruntime_has_quantised(tmp_path: Any) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    rng = np.random.default_rng(10)
    onnx.save(encoder(rng, "counts"), tmp_path / "floats.onnx")
    quantize_dynamic(
        tmp_path / "floats.onnx", tmp_path / "int8.onnx", weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"MatMulConstBOnly": True, "DefaultTensorType": FLOAT},
    )  # fmt: skip
    model, inputs = onnx.load(tmp_path / "int8.onnx"), tokens(rng, 2, 20)
    ops = Counter(node.op_type for node in model.graph.node)
    assert ops["QAttention"] == LAYERS and ops["DynamicQuantizeLinear"]
    with network_of(model, threads=2) as network:
        (region,) = native(network, inputs)
        counts = Counter(one.kernel for one in region.operations)
        # The first attention reads the codes of the embedding's table.
        assert counts["convolution_u8"] == 4 * LAYERS - 1 and not counts["convolution_f32"]
        found, expected = network(inputs)["y"], reference(model, inputs)["y"]
    # Where a sum rounds otherwise, a code may be the next one: some hundredths, in a few places.
    assert float(np.sqrt(((found - expected) ** 2).mean())) < 0.01
    assert float(np.abs(found - expected).max()) < 0.2


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("shape", [(6, 32), (1, 6, 32)])
def test_a_skip_that_is_the_same_for_each_of_a_batch(
    batch: int, constant: bool, shape: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(12)
    skip, x = (rng.standard_normal(of).astype(np.float32) for of in (shape, (batch, 6, 32)))
    norm = helper.make_node(
        "SkipLayerNormalization", ["r", "skip", "weight"], ["n"], domain="com.microsoft"
    )
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]), norm, helper.make_node("MatMul", ["n", "w"], ["y"]),
    ]  # fmt: skip
    constants = {
        "w": rng.standard_normal((32, 16)).astype(np.float32), "weight": np.ones(32, np.float32),
    }  # fmt: skip
    shapes, inputs = {"x": (FLOAT, ["n", 6, 32])}, {"x": x}
    if constant:
        constants["skip"] = skip
    else:
        shapes["skip"], inputs["skip"] = (FLOAT, list(shape)), skip
    model = model_of(nodes, shapes, ["y"], constants)
    with network_of(model, threads=2) as network:
        # The kernel for sums adds constant rows, or values of one shape.
        ours = constant or (batch == 1 and len(shape) == 3)
        where = [kind for kind, _ in network.plan(inputs).where()]
        assert ("onnxruntime" not in where) == ours
        found = network(inputs)["y"]
    np.testing.assert_allclose(found, reference(model, inputs)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_rows_of_tables(dtype: Any) -> None:
    rng = np.random.default_rng(11)
    nodes = [
        helper.make_node("Gather", ["words", "ids"], ["a"]),
        helper.make_node("Gather", ["kinds", "ids"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["c"]),
        helper.make_node("Add", ["c", "places"], ["y"]),
    ]
    constants = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in (("words", (9, 20)), ("kinds", (9, 20)), ("places", (1, 6, 20)))
    }
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = model_of(nodes, {"ids": (kind, ["n", 6])}, ["y"], constants)
    with network_of(model, threads=2) as network:
        for n in (1, 3):
            ids = rng.integers(-9, 9, (n, 6)).astype(dtype)
            assert [kind for kind, _ in network.plan({"ids": ids}).where()] == ["headrace"]
            found, expected = network({"ids": ids})["y"], reference(model, {"ids": ids})["y"]
            np.testing.assert_array_equal(found, expected)
        for wrong in (9, -10, np.iinfo(dtype).min, np.iinfo(dtype).max):
            ids[-1, -1] = wrong
            with pytest.raises(HeadraceError, match=str(wrong)):
                network({"ids": ids})


@pytest.mark.parametrize("how", ["slices", "gathers", "split", "columns"])
@pytest.mark.parametrize("head", [8, 16])
def test_queries_keys_and_values_in_one(how: str, head: int) -> None:
    """As vision transformers have them: parts of one product, in the order of their dimensions."""
    heads, count, rng = 3, 10, np.random.default_rng(7)
    width = heads * head
    constants = {
        "w": rng.standard_normal((width, 3 * width)).astype(np.float32) / 8,
        "v": rng.standard_normal((width, width)).astype(np.float32) / 8,
        "scale": np.array(head**-0.5, np.float32), "zero": np.array([0]),
        "five": np.array([2, count, 3, heads, head]), "four": np.array([2, count, heads, head]),
        "back": np.array([2, count, width]), "thirds": np.array([width] * 3),
    }  # fmt: skip
    nodes = [helper.make_node("MatMul", ["x", "w"], ["p"])]
    if how == "columns":
        nodes.append(helper.make_node("Split", ["p", "thirds"], ["p0", "p1", "p2"], axis=2))
        for i in range(3):
            nodes.append(helper.make_node("Reshape", [f"p{i}", "four"], [f"r{i}"]))
            nodes.append(helper.make_node("Transpose", [f"r{i}"], [f"h{i}"], perm=[0, 2, 1, 3]))
    else:
        nodes.append(helper.make_node("Reshape", ["p", "five"], ["r"]))
        nodes.append(helper.make_node("Transpose", ["r"], ["t"], perm=[2, 0, 3, 1, 4]))
        if how == "split":
            names = [f"s{i}" for i in range(3)]
            nodes.append(helper.make_node("Split", ["t"], names, axis=0, num_outputs=3))
        for i in range(3):
            constants |= {f"n{i}": np.array([i]), f"i{i}": np.array(i), f"e{i}": np.array([i + 1])}
            if how == "slices":
                inputs = ["t", f"n{i}", f"e{i}", "zero"]
                nodes.append(helper.make_node("Slice", inputs, [f"s{i}"]))
            if how == "gathers":
                nodes.append(helper.make_node("Gather", ["t", f"i{i}"], [f"h{i}"], axis=0))
            else:
                nodes.append(helper.make_node("Squeeze", [f"s{i}", "zero"], [f"h{i}"]))
    nodes += [
        helper.make_node("Mul", ["h0", "scale"], ["q"]),
        helper.make_node("Transpose", ["h1"], ["k"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "k"], ["a"]),
        helper.make_node("Softmax", ["a"], ["b"], axis=-1),
        helper.make_node("MatMul", ["b", "h2"], ["c"]),
        helper.make_node("Transpose", ["c"], ["d"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["d", "back"], ["e"]),
        helper.make_node("MatMul", ["e", "v"], ["y"]),
    ]
    wanted = {name for one in nodes for name in one.input}
    used = {name: array for name, array in constants.items() if name in wanted}
    model = model_of(nodes, {"x": (FLOAT, [2, count, width])}, ["y"], used)
    inputs = {"x": rng.standard_normal((2, count, width)).astype(np.float32)}
    with network_of(model, threads=2) as network:
        (region,) = native(network, inputs)
        kernels = [one.kernel for one in region.operations]
        assert kernels == ["convolution_f32", "attention_rows_f32", "convolution_f32"]
        found, expected = network(inputs)["y"], reference(model, inputs)["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-5)


def test_images_between_rows() -> None:
    """[images, rows, columns, channels] on the way from rows to images and back: nothing moves."""
    rng = np.random.default_rng(8)
    constants = {
        "w": rng.standard_normal((20, 20)).astype(np.float32), "grid": np.array([2, 3, 5, 20]),
        "k": rng.standard_normal((24, 20, 3, 3)).astype(np.float32) / 9,
        "rows": np.array([2, 15, 24]), "v": rng.standard_normal((24, 7)).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Reshape", ["a", "grid"], ["b"]),
        helper.make_node("Transpose", ["b"], ["c"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["c", "k"], ["d"], pads=[1, 1, 1, 1]),
        helper.make_node("Transpose", ["d"], ["e"], perm=[0, 2, 3, 1]),
        helper.make_node("Reshape", ["e", "rows"], ["f"]),
        helper.make_node("MatMul", ["f", "v"], ["y"]),
    ]
    model = model_of(nodes, {"x": (FLOAT, [2, 15, 20])}, ["y"], constants)
    inputs = {"x": rng.standard_normal((2, 15, 20)).astype(np.float32)}
    with network_of(model, threads=2) as network:
        native(network, inputs)
        found, expected = network(inputs)["y"], reference(model, inputs)["y"]
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=3e-4)
