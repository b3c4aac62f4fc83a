"""The backends: `base` is the protocol, every other module one implementation of it."""
