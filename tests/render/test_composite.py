"""Pictures of every kind of input, with the right numbers in their words."""

import dataclasses

import numpy as np
import pytest
from support.invalid import FOUR_SAMPLES, invalidated
from support.measuring import record_of_shape

from lightning_hessian.render.canvas import to_image
from lightning_hessian.render.composite import composite
from lightning_hessian.render.maps import as_image

ARRAYS = ("hessian", "x", "labels", "predicted", "classes", "gradient", "eigenvalues", "eigenvectors", "vector_index")
ARRAYS += ("residuals", "converged", "valid")


def words(figure) -> str:
    return "\n".join(text.get_text() for axes in figure.axes for text in axes.texts)


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 4), (2, 3, 3), (5, 4), (8,), (1,)])
def test_every_input_shape_is_drawn(shape):
    record = record_of_shape(*shape, labels=len(shape) > 1)
    image = to_image(composite(record, 2))
    assert image.dtype == np.uint8
    assert image.std() > 0


def test_the_words_are_the_records_numbers():
    record = record_of_shape(1, 6, 6)
    shown = words(composite(record, 2))
    assert "Input-Hessian of logit, class 2: epoch 3, after 12 optimizer steps" in shown
    assert "Hessian 36×36, logit per input unit²" in shown
    assert "sample 1, class 2\nlabel 2" in shown
    (axes,) = composite(record, 2).axes
    shown_matrices = [image.get_array() for image in axes.images if image.get_array().shape == (36, 36)]
    np.testing.assert_array_equal(shown_matrices, record.hessian[:, 1])
    value = record.eigenvalues[0, 1, record.vector_index[0, 1, 0]]
    assert f"λ = {value:.3g}".replace("-", "−") in shown
    assert "not converged" not in shown


def test_what_did_not_converge_is_marked():
    record = record_of_shape(1, 6, 6)
    doubtful = dataclasses.replace(record, converged=np.zeros_like(record.converged))
    assert "(not converged)" in words(composite(doubtful, 1))


def test_a_zero_hessian_can_be_drawn():
    record = record_of_shape(1, 6, 6)
    to_image(composite(dataclasses.replace(record, hessian=np.zeros_like(record.hessian)), 1))


def test_no_matrices_no_picture():
    with pytest.raises(ValueError, match=r"step 12 holds no whole Hessian of sample 0, nor all eigenvectors"):
        composite(dataclasses.replace(record_of_shape(8), hessian=None, eigenvectors=None), 1)


def test_eigenvectors_of_every_eigenvalue_are_the_matrix():
    record = record_of_shape(8)
    np.testing.assert_array_equal(
        to_image(composite(dataclasses.replace(record, hessian=None), 1)),
        to_image(composite(dataclasses.replace(record, hessian=record.hessian[:1]), 1)),
    )


def test_the_scale_is_that_of_the_run_and_what_it_hides_is_said():
    record = record_of_shape(1, 6, 6)
    assert "scale of the run; largest" in words(composite(record, 1))
    grown = dataclasses.replace(record, hessian=100 * record.hessian)
    shown = words(composite(grown, 1))
    limit = f"≥ {record.color_scale[0, 0]:.3g}"
    assert limit in shown
    share = (abs(grown.hessian[0, 0]) > record.color_scale[0, 0]).mean()
    assert f"CLIPPED: {share:.0%} of the entries lie beyond the scale" in shown
    assert "FAINT: 99% of the entries" in words(
        composite(dataclasses.replace(record, hessian=0.01 * record.hessian), 1)
    )


def test_of_many_samples_the_first_are_drawn():
    record = record_of_shape(1, 2, 2)
    many = dataclasses.replace(
        record,
        **{n: np.repeat(getattr(record, n), 10, axis=0) for n in ARRAYS},
        metrics={n: np.repeat(a, 10, axis=0) for n, a in record.metrics.items()},
    )
    figure = composite(many, 1)
    assert "(the first 8 of 20 samples)" in words(figure)
    assert figure.get_figheight() < 45


def test_channels_stand_side_by_side():
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert np.array_equal(as_image(values), np.concatenate([values[0], values[1]], axis=1))


@pytest.mark.parametrize("case", FOUR_SAMPLES)
def test_a_hessian_that_is_not_valid_is_a_gray_panel(case):
    whole = record_of_shape(1, 6, 6, num_samples=4)
    valid = np.array(FOUR_SAMPLES[case], bool)
    record = invalidated(whole, valid)
    for k, class_id in enumerate(record.class_ids):
        figure = composite(record, class_id)
        num_valid = int(valid[:, k].sum())
        (axes,) = figure.axes
        matrices = [image.get_array() for image in axes.images if image.get_array().shape == (36, 36)]
        np.testing.assert_array_equal(np.array(matrices).reshape(-1, 36, 36), whole.hessian[valid[:, k], k])
        assert words(figure).count("not valid") == 2 * (4 - num_valid)
        assert all(f"sample {n}, class {class_id}" in words(figure) for n in range(4))
        assert "exactly zero" not in words(figure)
        assert all(
            np.isfinite(image.get_array()).all() and np.isfinite(image.get_clim()).all() for image in axes.images
        )
        assert to_image(figure).std() > 0
