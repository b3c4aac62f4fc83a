"""Exceptions for mistakes that the person at the keyboard can mend."""


class InputError(ValueError):
    """Something the caller gave cannot be used; the message is one line that says what to do.

    The command line prints the message and exits with status 2; from Python it is an ordinary `ValueError`.
    """


class OverflowingError(InputError):
    """Activations that overflow: the strength is too high for this model and controller."""
