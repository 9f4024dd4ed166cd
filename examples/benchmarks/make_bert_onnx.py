"""Write an encoder of BERT's architecture as ONNX, from its Hugging Face directory.

    python make_bert_onnx.py DIRECTORY OUT.onnx [--optimised ORT.onnx] [--int8 INT8.onnx]

DIRECTORY has config.json and model.safetensors (all-MiniLM-L6-v2, bge-small, ...). The graph is
the one that PyTorch's exporter gives: any batch and number of tokens, `last_hidden_state` comes
out. `--optimised` also writes what onnxruntime's transformer optimiser makes of it (its own fused
operators), `--int8` what its dynamic quantisation makes of that: the best files onnxruntime has.
Both need the package sympy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import onnx

from headrace.loaders.folder import Folder
from headrace.networks.encoders.bert import read_bert, with_weights


def main() -> None:
    """As the module says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--optimised", type=Path, help="onnxruntime's own file of it")
    parser.add_argument("--int8", type=Path, help="dynamically quantised by onnxruntime")
    given = parser.parse_args()
    onnx.save(with_weights(read_bert(Folder(given.directory))), given.out)
    if not (given.optimised or given.int8):
        return
    from onnxruntime.transformers import optimizer

    config = json.loads((given.directory / "config.json").read_text())
    found = optimizer.optimize_model(
        str(given.out), "bert", num_heads=config["num_attention_heads"],
        hidden_size=config["hidden_size"], opt_level=0,
    )  # fmt: skip
    optimised = given.optimised or given.int8
    found.save_model_to_file(str(optimised))
    if given.int8:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            optimised, given.int8, weight_type=QuantType.QInt8, per_channel=True,
            extra_options={
                "MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT,
            },
        )  # fmt: skip


if __name__ == "__main__":
    main()
