"""llama.cpp as a backend: GGUF files as they are, decoded and steered by llama-cpp-python's low-level interface."""
