"""What goes wrong that is not a wrong argument (those raise ``TypeError`` and ``ValueError``)."""


class QKNormError(RuntimeError):
    """Base of the errors below."""


class BuildError(QKNormError):
    """A module could not be built: no compiler, or one that refused; the message says which."""


class ModuleFileError(QKNormError):
    """A file is no module, is damaged, or cannot run on this machine; the message says which."""


class TuningError(QKNormError):
    """Tuning cannot start or go on, or a log is not usable; the message says what to do."""
