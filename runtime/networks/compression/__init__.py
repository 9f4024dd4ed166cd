"""Smaller ONNX files: post-training quantisation."""
