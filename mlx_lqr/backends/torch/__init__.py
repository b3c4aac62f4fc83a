"""PyTorch with transformers: CUDA, or the CPU."""
