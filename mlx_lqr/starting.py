"""First of all, where this process is the command line: `mlx-lqr`, `python -m mlx_lqr`, its runtime, or `cli.py`.

Nothing is imported from the current folder, which `python -m` puts before the installed packages. Until the command
begins to work, and after it has ended, Ctrl-C ends the process without a word.
"""

import os
import sys

STOPPED = 128 + 2
"""Exit status after Ctrl-C, the one that a shell reports for a program ended by SIGINT."""


def _module() -> str | None:
    """What `python -m` runs, as long as Python still looks for it."""
    if sys.argv[:1] != ["-m"]:
        return None
    name = sys.orig_argv[-len(sys.argv)]
    return name.partition("m")[2] if name.startswith("-") else name  # `-mNAME` is one word


def _is_launcher() -> bool:
    """Whether the program is the checkout's cli.py."""
    launcher = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "cli.py")
    return os.path.realpath(sys.argv[0]) == os.path.realpath(launcher)


def _leave_folder() -> bool:
    """Whether this process is the command line; if so, the folder that Python has put first is not looked through."""
    if not getattr(sys, "argv", None):
        return False
    module = _module()
    if module is None and not _is_launcher():
        return os.path.basename(sys.argv[0]).removesuffix(".exe") == "mlx-lqr"
    if module is not None and module.partition(".")[0] != "mlx_lqr":
        return False
    if not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
        del sys.path[0]
    return True


_program = _leave_folder()

import atexit  # noqa: E402 - no other module before this
import signal  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from contextlib import contextmanager, suppress  # noqa: E402

_stopped = False


def _end(*_: object) -> None:
    os._exit(STOPPED)


def _finish() -> None:
    """Runs last. Python itself would, after some interruptions, end as if it had not caught them."""
    if _stopped:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):
                stream.flush()
        _end()


if _program and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
    atexit.register(_finish)


@contextmanager
def interruptible() -> Iterator[None]:
    """Around the work of a command: Ctrl-C is a KeyboardInterrupt, whatever a library makes of it."""
    global _stopped
    if signal.getsignal(signal.SIGINT) is not _end:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    except BaseException as error:
        interruption = _interruption(error)
        _stopped = interruption is not None
        if interruption is None or interruption is error:
            raise
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, _end)


def _interruption(error: BaseException | None) -> KeyboardInterrupt | None:
    """The interruption that an error comes from: compiled modules that are being imported make it an ImportError, of
    which may have been made a refusal."""
    if not isinstance(error, (KeyboardInterrupt, ImportError, ValueError)):
        return None  # such as the way out that a command has chosen after an interruption
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error
