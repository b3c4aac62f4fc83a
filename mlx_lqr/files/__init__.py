"""Reading and writing files: atomic writes, safetensors, Jacobians layer by layer, text and prompts, the cache."""
