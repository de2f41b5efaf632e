"""The two ways in which a measurement can be refused, and the one in which it can get lost."""


class ConfigurationError(ValueError):
    """What was asked for cannot be measured; the message says what to change."""


class MeasurementError(RuntimeError):
    """A measurement was possible to start but gave no number that may be shown."""


class WritingError(RuntimeError):
    """A measurement was made, but one of those who keep or show it failed; the others were served.

    Args:
        message: what failed, why, and what to do.
        cause: the same for every step at which the same thing fails in the same way.
    """

    def __init__(self, message: str, cause: str) -> None:
        super().__init__(message, cause)
        self.cause = cause

    def __str__(self) -> str:
        return str(self.args[0])
