"""Text encoders from directories, against a plain numpy one; what their files may say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

import headrace
import headrace.model
from headrace.cli import main
from headrace.errors import HeadraceError, ModelFileError, ModelNotFoundError, UnsupportedError
from headrace.loaders.folder import Folder
from headrace.loaders.sources import is_encoder
from headrace.networks.encoders.bert import read_bert, with_weights
from headrace.networks.encoders.encoder import Encoder, load_encoder

WIDTH, HEADS, INNER, LAYERS, PLACES = 48, 3, 64, 2, 40
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnopqrstuvwxyz"]
TEXTS = ["a b c", "d", "a b c d e f g h i j k l m n o p q r s t u v", "z y x"]
CONFIG: dict[str, Any] = {
    "architectures": ["BertModel"], "model_type": "bert", "hidden_act": "gelu",
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS,
    "intermediate_size": INNER, "max_position_embeddings": PLACES, "vocab_size": len(WORDS),
    "type_vocab_size": 2, "layer_norm_eps": 1e-12,
}  # fmt: skip


def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    found: dict[str, np.ndarray] = {}

    def put(name: str, *shape: int) -> None:
        scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.3
        found[name] = (rng.standard_normal(shape) * scale).astype(np.float32)

    def norm(name: str) -> None:
        put(f"{name}.weight", WIDTH)
        put(f"{name}.bias", WIDTH)
        found[f"{name}.weight"] += 1

    def linear(name: str, made: int, read: int) -> None:
        put(f"{name}.weight", made, read)
        put(f"{name}.bias", made)

    for name, rows in (("word", len(WORDS)), ("token_type", 2), ("position", PLACES)):
        put(f"embeddings.{name}_embeddings.weight", rows, WIDTH)
    norm("embeddings.LayerNorm")
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        for part in ("query", "key", "value"):
            linear(f"{layer}attention.self.{part}", WIDTH, WIDTH)
        linear(f"{layer}attention.output.dense", WIDTH, WIDTH)
        norm(f"{layer}attention.output.LayerNorm")
        linear(f"{layer}intermediate.dense", INNER, WIDTH)
        linear(f"{layer}output.dense", WIDTH, INNER)
        norm(f"{layer}output.LayerNorm")
    return found


def write(
    folder: Path, *, dtype: Any = np.float32, prefix: str = "", config: dict[str, Any] | None = None
) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({prefix + k: v.astype(dtype) for k, v in weights().items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps(CONFIG | (config or {})))
    _write_tokenizer(folder)
    pool(folder, "mean", normalize=True)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def pool(folder: Path, *modes: str, normalize: bool = False) -> None:
    names = {
        "cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens",
        "mean_sqrt_len": "mean_sqrt_len_tokens", "last": "lasttoken",
    }  # fmt: skip
    inner = folder / "1_Pooling"
    inner.mkdir(exist_ok=True)
    said = {f"pooling_mode_{text}": name in modes for name, text in names.items()}
    (inner / "config.json").write_text(json.dumps({"word_embedding_dimension": WIDTH, **said}))
    library = "sentence_transformers.models."
    modules = [
        {"path": "", "type": library + "Transformer"},
        {"path": "1_Pooling", "type": library + "Pooling"},
    ]
    if normalize:
        modules.append({"path": "2_Normalize", "type": library + "Normalize"})
    (folder / "modules.json").write_text(json.dumps(modules))


def states(text: str, w: dict[str, np.ndarray]) -> np.ndarray:
    """Hidden states of a text, in float64, written down anew."""
    w = {name: array.astype(np.float64) for name, array in w.items()}
    ids = [2, *(WORDS.index(word) for word in text.split()), 3]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        apart = x - x.mean(-1, keepdims=True)
        scale = np.sqrt((apart**2).mean(-1, keepdims=True) + 1e-12)
        found: np.ndarray = apart / scale * w[f"{name}.weight"] + w[f"{name}.bias"]
        return found

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        found: np.ndarray = x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
        return found

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.token_type_embeddings.weight"][0]
    x = norm(x + w["embeddings.position_embeddings.weight"][: len(ids)], "embeddings.LayerNorm")
    erf = np.vectorize(math.erf)
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}."
        q, k, v = (
            linear(x, f"{layer}attention.self.{part}").reshape(len(ids), HEADS, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )
        scores = q @ k.swapaxes(1, 2) / math.sqrt(WIDTH // HEADS)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (share / share.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(len(ids), WIDTH)
        mixed = linear(mixed, layer + "attention.output.dense")
        x = norm(x + mixed, layer + "attention.output.LayerNorm")
        inner = linear(x, layer + "intermediate.dense")
        inner = inner / 2 * (1 + erf(inner / math.sqrt(2)))
        x = norm(x + linear(inner, layer + "output.dense"), layer + "output.LayerNorm")
    return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "encoder")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    found = headrace.load(folder, threads=2)
    assert isinstance(found, Encoder)
    return found


def unit(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = x / np.linalg.norm(x, axis=-1, keepdims=True)
    return found


def test_vectors_are_those_of_a_plain_implementation(encoder: Encoder) -> None:
    found = encoder.embed(TEXTS)
    expected = np.stack([unit(states(text, weights()).mean(0)) for text in TEXTS])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    shapes = {name: np.zeros((1, 16), np.int64) for name in encoder._takes}
    assert "headrace" in [kind for kind, _ in encoder.network.plan(shapes).where()]


def test_a_vector_depends_on_its_text_alone(encoder: Encoder) -> None:
    whole = encoder.embed(TEXTS)
    for i, text in enumerate(TEXTS):
        np.testing.assert_array_equal(encoder.embed(text)[0], whole[i])
    np.testing.assert_array_equal(encoder.embed(TEXTS[::-1])[::-1], whole)
    np.testing.assert_array_equal(encoder.embed([TEXTS[0]] * 37), whole[[0] * 37])


@pytest.mark.parametrize("mode", ["cls", "max", "mean", "mean_sqrt_len", "last"])
def test_modes_of_pooling(tmp_path: Path, mode: str) -> None:
    write(tmp_path)
    pool(tmp_path, mode)
    with load_encoder(tmp_path, threads=1) as found:
        vectors = found.embed(TEXTS)
    for text, vector in zip(TEXTS, vectors, strict=True):
        x = states(text, weights())
        expected = {
            "cls": x[0], "max": x.max(0), "mean": x.mean(0), "last": x[-1],
            "mean_sqrt_len": x.sum(0) / math.sqrt(len(x)),
        }[mode]  # fmt: skip
        np.testing.assert_allclose(vector, expected, atol=2e-5)


def test_modes_beside_each_other(tmp_path: Path) -> None:
    write(tmp_path)
    pool(tmp_path, "cls", "mean")
    with load_encoder(tmp_path, threads=1) as found:
        x = states("a b", weights())
        expected = np.concatenate([x[0], x.mean(0)])
        np.testing.assert_allclose(found.embed("a b")[0], expected, atol=2e-5)


@pytest.mark.parametrize(("dtype", "prefix"), [(np.float16, "bert."), (bfloat16, "")])
def test_weights_of_other_types_and_names(tmp_path: Path, dtype: Any, prefix: str) -> None:
    write(tmp_path, dtype=dtype, prefix=prefix)
    rounded = {name: array.astype(dtype).astype(np.float32) for name, array in weights().items()}
    with load_encoder(tmp_path, threads=1) as found:
        expected = unit(states("a b", rounded).mean(0))
        np.testing.assert_allclose(found.embed("a b")[0], expected, atol=2e-6)


@pytest.mark.parametrize("place", ["model.onnx", "onnx/model.onnx"])
def test_an_onnx_file_and_its_tokenizer(folder: Path, tmp_path: Path, place: str) -> None:
    expected = load_encoder(folder, threads=1).embed(TEXTS)
    write(tmp_path)
    (tmp_path / "onnx").mkdir()
    onnx.save(with_weights(read_bert(Folder(folder))), tmp_path / place)
    (tmp_path / "model.safetensors").unlink()
    for name in (tmp_path, tmp_path / place):
        with load_encoder(name, threads=1) as found:
            np.testing.assert_allclose(found.embed(TEXTS), expected, atol=1e-6)


def test_long_texts_are_cut(folder: Path, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "sentence_bert_config.json").write_text('{"max_seq_length": 5}')
    with load_encoder(tmp_path, threads=1) as found:
        assert found.settings.max_tokens == 5
        np.testing.assert_allclose(found.embed("a b c d e f"), found.embed("a b c"), atol=1e-7)
    with load_encoder(folder, threads=1) as found:
        assert found.settings.max_tokens == PLACES
        found.embed("a " * 100)


def test_without_modules_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path)
    (tmp_path / "modules.json").unlink()
    assert main(["embed", str(tmp_path), "a b", "c"]) == 0
    assert "mean of all tokens" in capsys.readouterr().err


def test_the_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "vectors.npy"
    assert main(["embed", str(folder), *TEXTS, "-o", str(path)]) == 0
    expected = load_encoder(folder).embed(TEXTS)
    np.testing.assert_array_equal(np.load(path), expected)
    capsys.readouterr()
    weights, before = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
    assert main(["embed", str(folder), *TEXTS, "-o", str(weights)]) == 2
    assert "name another file" in capsys.readouterr().err
    assert weights.read_bytes() == before
    assert main(["embed", str(folder), *TEXTS, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    np.testing.assert_allclose([row["vector"] for row in found["texts"]], expected, atol=1e-7)
    assert main(["embed", str(folder), "a b", "a b"]) == 0
    assert "1.000  1.000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"model_type": "roberta"}, UnsupportedError, "roberta"),
        ({"hidden_act": "mish"}, UnsupportedError, "mish"),
        ({"position_embedding_type": "relative_key"}, UnsupportedError, "positions"),
        ({"hidden_size": 64}, ModelFileError, "num_attention_heads"),
        ({"intermediate_size": 80}, ModelFileError, "config.json says"),
        ({"num_hidden_layers": 3}, ModelFileError, "no such tensor"),
        ({"num_attention_heads": 0}, ModelFileError, "at least 1"),
        ({"vocab_size": 1 << 40}, ModelFileError, "vocab_size"),
    ],
)
def test_what_config_may_not_say(
    tmp_path: Path, change: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        load_encoder(write(tmp_path, config=change))


def test_what_is_no_encoder(folder: Path, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelFileError, match="no tokenizer"):
        load_encoder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError, match="needs the tokenizer"):
        load_encoder(tmp_path)
    _write_tokenizer(tmp_path)
    for text, error in (("[", ModelFileError), ("{}", ModelFileError), ("[3]", ModelFileError)):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(error):
            load_encoder(tmp_path)
    dense = [{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(dense))
    with pytest.raises(UnsupportedError, match="Dense"):
        load_encoder(tmp_path)
    away = [{"path": "../encoder", "type": "sentence_transformers.models.Pooling"}]
    (tmp_path / "modules.json").write_text(json.dumps(away))
    with pytest.raises(ModelFileError):
        load_encoder(tmp_path)
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    x, y = (onnx.helper.make_tensor_value_info(n, 1, [3]) for n in "xy")
    (tmp_path / "modules.json").unlink()
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y])),
              tmp_path / "model.onnx")  # fmt: skip
    with pytest.raises(HeadraceError, match="no text encoder"):
        load_encoder(tmp_path)
    with pytest.raises(ModelNotFoundError, match="nowhere: no such file or directory"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least one text"):
        load_encoder(folder).embed([])
    with pytest.raises(TypeError, match="one is bytes"):
        load_encoder(folder).embed(["a", b"b"])  # type: ignore[list-item]
    with pytest.raises(UnsupportedError, match="headrace embed"):
        headrace.model.load(folder)


def test_which_directories_are_encoders(folder: Path, tmp_path: Path) -> None:
    assert is_encoder(folder) and not is_encoder(tmp_path) and not is_encoder(tmp_path / "no")
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").touch()
    assert is_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()  # a language model that was exported, too
    assert not is_encoder(tmp_path)
    (tmp_path / "modules.json").touch()
    assert is_encoder(tmp_path)
