"""Smaller ONNX files: pruning and quantisation after training."""
