"""What goes wrong that is not a wrong argument (those raise ``TypeError`` and ``ValueError``)."""

from __future__ import annotations

import sys
import warnings


def printable(text: str) -> str:
    """Return a text with control characters written as escapes, such as ``\\x1b``.

    File names and metadata are whatever their authors liked. Lines and tabs stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class QKNormError(RuntimeError):
    """Base of the errors below."""

    def __init__(self, message: str = ""):
        super().__init__(printable(message))


class BuildError(QKNormError):
    """A module could not be built: no compiler, or one that refused; the message says which."""


class ModuleFileError(QKNormError):
    """A file is no module, is damaged, or cannot run on this machine; the message says which."""


class TuningError(QKNormError):
    """Tuning cannot start or go on, or a log is not usable; the message says what to do."""


class PeerError(QKNormError):
    """Ranks cannot reach one another's memory, or one of them did not come; the message says which.

    After the latter the workspace is of no more use: the ranks no longer agree where they are.
    """


#: Packages whose frames lie between a caller and a warning: this one, and torch's operators.
_NOT_THE_CALLER = ("qknorm_tvm", "torch")


def warn_caller(message: str) -> None:
    """Issue a ``RuntimeWarning`` that names the line of the caller's own code."""
    depth = 1
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_THE_CALLER:
            break
        frame, depth = frame.f_back, depth + 1
    warnings.warn(printable(message), RuntimeWarning, stacklevel=depth + 1)
