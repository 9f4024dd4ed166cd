"""Networks of ONNX files: graphs of operators, on our kernels and on the host's."""
