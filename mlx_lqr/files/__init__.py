"""What is read and written: atomic writes, safetensors, Jacobians layer by layer, prompts, the cache folder."""
