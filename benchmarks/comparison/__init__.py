"""The methods compared on two small models: how docs/comparison.md is measured and written (see `__main__`)."""
