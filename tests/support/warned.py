"""What the package warns of."""

import warnings


def told(function, *arguments, **named):
    """What a function returns, and what it warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*arguments, **named)
    return result, " ".join(str(warning.message) for warning in caught)
