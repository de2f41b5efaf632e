"""The two ways in which a measurement can be refused."""


class ConfigurationError(ValueError):
    """What was asked for cannot be measured; the message says what to change."""


class MeasurementError(RuntimeError):
    """A measurement was possible to start but gave no number that may be shown."""
