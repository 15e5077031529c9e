"""Where a network executes: PyTorch, ONNX Runtime, OpenVINO or TensorRT."""
