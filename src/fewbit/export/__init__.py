"""A Net becomes an ONNX file."""
