"""Figures of one sample and class: what is drawn are the record's numbers."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest
from support.measuring import record_of_shape
from support.quadratic import quadratic_record

from lightning_hessian import plot_hessian, plot_input, plot_spectrum


def words(figure):
    texts = [axes.get_title() for axes in figure.axes] + [figure.get_suptitle()]
    return "\n".join(texts)


def drawn(figure):
    """Points and error bars of a spectrum, by the words of its legend."""
    (axes,) = figure.axes
    return {
        c.get_label(): (c.lines[0].get_xdata(), c.lines[0].get_ydata(), c.lines[2][0].get_segments())
        for c in axes.containers
    }


def test_a_spectrum_is_drawn_with_its_residuals():
    record = quadratic_record(3.0, 1.0, -2.0, 0.0)
    record = dataclasses.replace(record, residuals=np.array([[[0.1, 0.2, 0.0, 0.4]]]))
    points = drawn(plot_spectrum(record))
    assert set(points) == {"positive", "negative", "zero within the residual"}
    numbers, values, bars = points["positive"]
    assert numbers.tolist() == [1, 2]
    assert values.tolist() == [3, 1]
    np.testing.assert_allclose([bar[:, 1] for bar in bars], [[2.9, 3.1], [0.8, 1.2]])
    assert points["zero within the residual"][1].tolist() == [0]
    assert points["negative"][0].tolist() == [4]
    np.testing.assert_allclose(points["negative"][2][0][:, 1], [-2.4, -1.6])


def test_what_did_not_converge_is_marked():
    record = quadratic_record(3.0, 1.0, -2.0)
    record = dataclasses.replace(record, converged=np.array([[[True, False, True]]]))
    figure = plot_spectrum(record)
    points = drawn(figure)
    assert points["not converged"][1].tolist() == [1]
    assert points["positive"][1].tolist() == [3]
    assert "not converged" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert "λ = 1 ± 0e+00 (not converged)" in words(plot_input(record))


@pytest.mark.parametrize(
    ("complete", "rest"), [(True, "the other 1 are all zero"), (False, "the other 1 are between the two ends")]
)
def test_eigenvalues_that_are_not_listed_are_explained(complete, rest):
    record = quadratic_record(3.0, -2.0, 0.0)
    few = {name: getattr(record, name)[..., [0, 2]] for name in ("eigenvalues", "residuals", "converged")}
    figure = plot_spectrum(dataclasses.replace(record, **few, complete=complete))
    assert f"2 eigenvalues; {rest}" in words(figure)


def test_a_zero_spectrum_can_be_drawn():
    figure = plot_spectrum(quadratic_record(0.0, 0.0))
    assert drawn(figure)["zero within the residual"][1].tolist() == [0, 0]
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_hessian_is_drawn_with_its_scale():
    record = record_of_shape(1, 6, 6)
    figure = plot_hessian(record, sample=1, class_id=2)
    image = figure.axes[0].images[0]
    np.testing.assert_array_equal(image.get_array(), record.hessian[1, 1])
    limit = np.quantile(np.abs(record.hessian[1, 1]), 0.99)
    np.testing.assert_allclose(image.get_clim(), (-limit, limit))
    assert figure.axes[1].get_ylabel() == "logit per input unit²"
    assert figure.axes[0].get_xlabel() == "input entry (row-major)"
    assert "logit of class 2, sample 1, epoch 3, after 12 optimizer steps\n36×36, largest |entry|" in words(figure)


@pytest.mark.parametrize("plot", [plot_spectrum, plot_hessian, plot_input])
def test_the_output_of_a_regression_is_not_called_a_class(plot):
    record = quadratic_record(3.0, 1.0, -2.0)
    assert "logit of output 0, sample 0, before training" in words(plot(record))


def test_no_matrix_is_a_sentence():
    record = quadratic_record(3.0, 1.0, -2.0)
    with pytest.raises(ValueError, match="step 0"):
        plot_hessian(dataclasses.replace(record, hessian=None, eigenvectors=None, vector_index=None))


@pytest.mark.parametrize("shape", [(1, 6, 6), (3, 4, 4), (2, 3, 3), (5, 4), (8,), (1,)])
def test_maps_of_every_input_shape(shape):
    record = record_of_shape(*shape)
    figure = plot_input(record, sample=1, num_eigenvectors=2)
    panels = {axes.get_label(): axes for axes in figure.axes}
    expected = {"input": record.x[1], "gradient": record.gradient[1, 0], "diagonal": record.diagonal[1, 0]}
    for rank in range(min(2, record.vector_index.shape[-1])):
        expected[f"eigenvector {rank + 1}"] = record.eigenvectors[1, 0, rank]
    for label, values in expected.items():
        axes = panels[label]
        if len(shape) == 1:
            np.testing.assert_array_equal(axes.lines[0].get_ydata(), values)
        elif label != "input" or shape[0] != 3:
            image = np.asarray(axes.images[0].get_array())
            cells = np.concatenate(values.reshape(-1, *shape[-2:]), axis=1)
            np.testing.assert_array_equal(image, cells)
    if len(shape) > 1:
        low, high = panels["gradient"].images[0].get_clim()
        assert -low == high == np.abs(record.gradient[1, 0]).max()
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_color_image_is_shown_from_its_smallest_to_its_largest_value():
    record = record_of_shape(3, 4, 4)
    (axes, *_) = plot_input(record).axes
    x = record.x[0]
    np.testing.assert_allclose(axes.images[0].get_array(), (x.transpose(1, 2, 0) - x.min()) / (x.max() - x.min()))
    assert "shown as 0 to 1" in axes.get_xlabel()


def test_the_titles_are_the_records_numbers():
    record = record_of_shape(1, 6, 6)
    shown = words(plot_input(record, sample=1, class_id=2))
    value = record.eigenvalues[1, 1, record.vector_index[1, 1, 0]]
    assert f"eigenvector 1 by |λ|\nλ = {value:.3g}".replace("-", "−") in shown
    assert f"gradient, ‖g‖ = {record.gradient_norm[1, 1]:.3g}" in shown
    assert f"label 2, predicted {record.predicted[1]}" in shown


def test_an_estimated_diagonal_shows_its_error():
    record = quadratic_record(3.0, 1.0, -2.0)
    assert "standard error" not in words(plot_input(record))
    record = dataclasses.replace(record, diagonal_error=np.array([[[0.1, 0.25, 0.0]]]))
    assert "diagonal of the Hessian\nstandard error at most 0.2" in words(plot_input(record))


@pytest.mark.parametrize("plot", [plot_spectrum, plot_hessian, plot_input])
def test_what_does_not_exist_raises(plot):
    record = quadratic_record(3.0, 1.0, -2.0, num_samples=2)
    with pytest.raises(IndexError, match="sample=2 is out of range: this record has samples 0 to 1"):
        plot(record, sample=2)
    with pytest.raises(ValueError, match="class_id=-1 was not measured: this record has 0"):
        plot(record, class_id=-1)


def test_pyplot_holds_no_figure():
    before = plt.get_fignums()
    plot_spectrum(quadratic_record(3.0, 1.0))
    assert plt.get_fignums() == before
