"""The color scale of a Hessian's picture is that of the run."""

import numpy as np

from lightning_hessian.records.color_scale import run_scale


def test_the_scale_of_pictures_is_that_of_the_first_hessian_that_is_not_zero():
    scale = run_scale(None, np.zeros((1, 1, 2, 2)))
    assert scale.tolist() == [[0]]
    scale = run_scale(scale, np.full((1, 1, 2, 2), -3.0))
    assert scale.tolist() == [[3]]
    for size, expected in ((0.1, 3), (8.9, 3), (50.0, 50), (3.0, 50)):  # grows where far exceeded, and never shrinks
        scale = run_scale(scale, np.full((1, 1, 2, 2), size))
        assert scale.tolist() == [[expected]]
    assert run_scale(scale, None) is scale
