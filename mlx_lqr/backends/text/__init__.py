"""Text and tokens, as the checkpoint's own tokenizer has them."""
