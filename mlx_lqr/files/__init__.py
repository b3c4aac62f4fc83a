"""Reading and writing files: atomic writes, safetensors, Jacobians by layer, text, prompts, results, the cache."""
