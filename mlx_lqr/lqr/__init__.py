"""Activation LQR: contrast, linearisation, Riccati recursion, and the controller made from them."""
