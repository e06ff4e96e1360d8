"""Models of other programs in, ours out: peers' checkpoints, LoRA files, diffusers folders, ONNX graphs."""
