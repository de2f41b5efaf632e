"""Pictures of every kind of input, with the right numbers in their words."""

import dataclasses

import matplotlib
import numpy as np
import pytest
from support.invalid import FOUR_SAMPLES, invalidated
from support.measuring import record_of_shape

from lightning_hessian.render.canvas import Canvas, colored
from lightning_hessian.render.composite import MATRIX, MATRIX_LEFT, TOP, WIDTH, composite
from lightning_hessian.render.maps import as_image, compact


def words(canvas) -> str:
    return "\n".join(canvas.words)


def heatmap(canvas) -> np.ndarray:
    """The pixels of the Hessian."""
    top = TOP + 13
    return canvas.to_array()[top : top + MATRIX, MATRIX_LEFT : MATRIX_LEFT + MATRIX]


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 4), (2, 3, 3), (5, 4), (8,), (1,)])
def test_every_input_shape_is_drawn_in_the_size_of_a_card(shape):
    record = record_of_shape(*shape, labels=len(shape) > 1)
    image = composite(record, 2).to_array()
    assert image.dtype == np.uint8
    assert image.shape == (215, 350, 3)
    assert image.std() > 0
    assert composite(record, 2, scale=3).to_array().shape == (645, 1050, 3)


def test_the_words_are_the_records_numbers():
    record = record_of_shape(1, 6, 6)
    canvas = composite(record, 2)
    assert canvas.words[:3] == [
        "sample 0",
        "logit of class 2",
        f"label 0, predicted {record.predicted[0]} – epoch 3, 12 steps",
    ]
    assert "Hessian 36×36" in canvas.words
    assert f"gradient, ‖g‖ {record.gradient_norm[0, 1]:.3g}" in canvas.words
    for rank in range(2):
        value = record.eigenvalues[0, 1, record.vector_index[0, 1, rank]]
        assert f"λ {value:.3g} ± ".replace("-", "−") in words(canvas)
    assert "not converged" not in words(canvas)


def test_the_pixels_are_the_entries():
    record = record_of_shape(11)
    limit = record.color_scale[0, 1]
    expected = colored(record.hessian[0, 1], -limit, limit, "RdBu_r").repeat(12, axis=0).repeat(12, axis=1)
    np.testing.assert_array_equal(heatmap(composite(record, 2)), expected)


def test_colors_are_those_of_matplotlib():
    values = np.linspace(-3, 3, 1001)
    expected = matplotlib.colormaps["RdBu_r"]((values + 2) / 4, bytes=True)[:, :3]
    np.testing.assert_array_equal(colored(values, -2.0, 2.0, "RdBu_r"), expected)


def test_nothing_is_wider_than_the_picture():
    """Long names are cut off, where "sample" stands beside them and at the edge."""
    record = record_of_shape(1, 6, 6)
    names = tuple(f"{n}, a class whose name is much longer than the picture is wide" for n in range(3))
    canvas = composite(dataclasses.replace(record, class_names=names), 2)
    assert canvas.words[1].startswith("logit of class 2, a class")
    assert canvas.words[1].endswith("…")
    assert canvas.words[0] == "sample 0"
    assert (canvas.to_array()[:, WIDTH - 2 :] == 255).all()


def test_outputs_without_labels_are_no_classes():
    shown = words(composite(record_of_shape(8, labels=False), 2))
    assert "logit of output 2" in shown
    assert "class" not in shown
    assert "predicted" not in shown
    named = dataclasses.replace(record_of_shape(8, labels=False), class_names=("coat", "dress", "bag"))
    assert "logit of class bag" in words(composite(named, 2))
    assert "predicted" in words(composite(named, 2))


def test_what_did_not_converge_is_marked():
    record = record_of_shape(1, 6, 6)
    doubtful = dataclasses.replace(record, converged=np.zeros_like(record.converged))
    shown = composite(doubtful, 1).words
    assert "*not converged" in shown
    assert sum(word.startswith("λ") and word.endswith("*") for word in shown) == 2


def test_a_zero_hessian_is_said_in_words():
    record = record_of_shape(1, 6, 6)
    zero = dataclasses.replace(
        record,
        hessian=np.zeros_like(record.hessian),
        eigenvalues=np.zeros_like(record.eigenvalues),
        diagnosis="piecewise_linear",
    )
    canvas = composite(zero, 1)
    assert {"exactly zero", "(piecewise linear)", "no curved directions:", "all λ are zero"} <= set(canvas.words)
    assert not any(word.startswith(("λ", "≤", "largest")) for word in canvas.words)
    pixels = heatmap(canvas)[2:-2, 2:-2]
    assert (pixels.max(axis=2) == pixels.min(axis=2)).all()  # gray


def test_no_matrices_no_picture():
    with pytest.raises(ValueError, match=r"step 12 holds no whole Hessian of sample 0, nor all eigenvectors"):
        composite(dataclasses.replace(record_of_shape(8), hessian=None, eigenvectors=None), 1)


def test_eigenvectors_of_every_eigenvalue_are_the_matrix():
    record = record_of_shape(8)
    np.testing.assert_array_equal(
        composite(dataclasses.replace(record, hessian=None), 1).to_array(),
        composite(dataclasses.replace(record, hessian=record.hessian[:1]), 1).to_array(),
    )


def test_the_scale_is_that_of_the_run_and_what_it_hides_is_said():
    record = record_of_shape(1, 6, 6)
    assert f"≥{compact(record.color_scale[0, 0])}" in words(composite(record, 1))
    assert f"largest |entry| {compact(np.abs(record.hessian[0, 0]).max())}" in words(composite(record, 1))
    grown = dataclasses.replace(record, hessian=100 * record.hessian)
    shown = words(composite(grown, 1))
    assert f"≥{compact(record.color_scale[0, 0])}" in shown
    share = (abs(grown.hessian[0, 0]) > record.color_scale[0, 0]).mean()
    assert f"{share:.0%} lie beyond the scale" in shown
    assert "faint: 99% within" in words(composite(dataclasses.replace(record, hessian=0.01 * record.hessian), 1))


def test_few_letters_hold_a_number():
    numbers = {0.000421: "4.2e−4", -0.0215: "−0.021", 0.0: "0", 1.0: "1", 123456.0: "1.2e5", -3e-17: "−3.0e−17"}
    assert {number: compact(number) for number in numbers} == numbers
    assert compact(4e-7, 1) == "4e−7"
    assert compact(-0.12345, 3) == "−0.123"


def test_large_pictures_are_averaged_not_sampled():
    canvas = Canvas(60, 60)
    colors = np.full((500, 500, 3), 255, np.uint8)
    colors[250, 250] = 0
    canvas.image((10, 10, 50, 50), colors)
    assert (canvas.to_array()[11:49, 11:49] < 255).any()


def test_channels_stand_side_by_side():
    values = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert np.array_equal(as_image(values), np.concatenate([values[0], values[1]], axis=1))


@pytest.mark.parametrize("case", FOUR_SAMPLES)
def test_the_first_valid_hessian_is_shown(case):
    whole = record_of_shape(11, num_samples=4)
    valid = np.array(FOUR_SAMPLES[case], bool)
    record = invalidated(whole, valid)
    for k, class_id in enumerate(record.class_ids):
        canvas = composite(record, class_id)
        if valid[:, k].any():
            first = int(valid[:, k].argmax())
            limit = whole.color_scale[first, k]
            matrix = colored(whole.hessian[first, k], -limit, limit, "RdBu_r").repeat(12, axis=0).repeat(12, axis=1)
            np.testing.assert_array_equal(heatmap(canvas), matrix)
            assert f"sample {first}" in canvas.words
            assert "not valid" not in words(canvas)
        else:
            assert {"sample 0", "Hessian not valid", "differences by 40%."} <= set(canvas.words)
            assert "Hessian 11×11" not in canvas.words
        assert "exactly zero" not in words(canvas)
        assert canvas.to_array().std() > 0
