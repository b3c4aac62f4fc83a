"""The method: contrast, linearisation, Riccati recursion and the controller that comes of them."""
