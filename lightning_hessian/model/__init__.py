"""From a live model to a pure function of its input; the model is left untouched."""
