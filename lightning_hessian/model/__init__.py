"""From a live model to a pure function of its input, and back untouched."""
