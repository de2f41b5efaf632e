"""A record in words says what was measured, its numbers, what they mean, and what is not to be trusted."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.invalid import FOUR_SAMPLES, invalidated
from support.measuring import Measurer
from support.networks import mlp
from support.quadratic import quadratic_record
from torch import nn

from lightning_hessian import Record, input_spectrum
from lightning_hessian.curvature.options import Options
from lightning_hessian.records.metrics import SUMMARIZED
from lightning_hessian.training.samples import Samples


def record_of(method="auto", activation=nn.Tanh, target="prob", num_samples=4, **options) -> Record:
    torch.manual_seed(0)
    monitor = Measurer(
        [0, 2], target, "float64", Options(method, **options), heatmap_samples=0, class_names=("a", "b", "c")
    )
    samples = Samples(torch.randn(num_samples, 6), torch.arange(num_samples) % 3)
    return monitor.measure(mlp(activation), samples, step=7, logged_step=6, epoch=1)


def line_after(text: str, start: str) -> str:
    """The first class's line of a metric."""
    lines = text.splitlines()
    return lines[next(i for i, line in enumerate(lines) if line.startswith(f"- {start}")) + 1]


def test_numbers_known_in_closed_form():
    """Of ½ Σ a x² with a = 3, 1, −2 at x = 1, 2, 3: g = 3, 2, −6, so ‖g‖ = 7."""
    text = quadratic_record(3.0, 1.0, -2.0).summary()
    assert text.startswith("Input Hessian of logit, before training: 1 sample, D = 3, output 0.\n")
    assert "largest λ, in logit per input unit²: how strongly" in text
    assert "    output 0: 3 (3 to 3). A step of length r along it adds 1.5 · r² to" in line_after(text, "largest λ")
    assert " -2 (-2 to -2). A step of length r along it adds -1 · r²" in line_after(text, "smallest λ")
    assert " 2 (2 to 2). Noise of variance s² in every input changes the target by 1 · s²" in line_after(text, "trace")
    assert "A step of 2.3 input units along the most curved" in line_after(text, "normalized curvature")  # 7 / 3
    assert " 4.67 (4.67 to 4.67). Within a tenth of it, 0.47 input units" in line_after(text, "linear radius")
    assert " 0.333 (0.333 to 0.333). About 33 % of the curvature" in line_after(text, "negative share")
    assert " 2.57 (2.57 to 2.57). The curvature is as concentrated as if 2.57 directions" in line_after(
        text, "effective rank"
    )  # 36 / 14
    assert "About 0 % comes from the target over the outputs, and 100 %" in line_after(text, "Gauss–Newton share")
    assert "Agrees with finite differences to" in text
    assert "Method dense (" in text
    assert "float64 on cpu" in text
    assert "3 Hessian-vector products per sample and class" in text


@pytest.mark.parametrize("radius", [0.1, 0.01])
def test_what_the_readings_say_is_true(radius):
    """To second order, of a quadratic function, along random directions and the most curved one."""
    a, x = np.array([3.0, 1.0, -2.0]), np.array([1.0, 2.0, 3.0])
    g = a * x
    linear_radius = 2 * np.linalg.norm(g) / 3

    def change(step):
        return 0.5 * (a * (x + step) ** 2).sum() - 0.5 * (a * x**2).sum()

    generator = np.random.default_rng(0)
    directions = generator.normal(size=(200, 3))
    for v in directions / np.linalg.norm(directions, axis=1, keepdims=True):
        step = radius * linear_radius * v
        assert abs(change(step) - g @ step) <= radius * np.linalg.norm(g) * np.linalg.norm(step) + 1e-12
    noise = radius * generator.normal(size=(200_000, 3))
    mean = (noise @ g + 0.5 * (noise**2 @ a)).mean()
    assert mean == pytest.approx(0.5 * a.sum() * radius**2, abs=4 * radius * np.linalg.norm(g) / math.sqrt(len(noise)))
    assert np.linalg.norm(a * np.array([1, 0, 0]) * np.linalg.norm(g) / 3) == pytest.approx(np.linalg.norm(g))


def test_every_metric_has_a_line_for_each_class():
    text = record_of().summary()
    lines = text.splitlines()
    for metric in SUMMARIZED:
        place = next(i for i, line in enumerate(lines) if line.startswith(f"- {metric.title}"))
        assert lines[place + 1].startswith("    class 0 (a): ")
        assert lines[place + 2].startswith("    class 2 (c): ")
    assert "**" not in text


def test_what_lanczos_does_not_know_is_said_and_the_rest_has_errors():
    text = record_of("lanczos", num_eigenvalues=2).summary()
    for name in ("effective rank", "negative share"):
        assert line_after(text, name).endswith(": unknown: only the ends of the spectra were computed.")
    assert " ± " in line_after(text, "trace")
    assert "2 eigenvalues at the ends of each spectrum, residual at most" in text


def test_what_has_not_converged_is_said():
    record = record_of("lanczos", num_eigenvalues=2)
    text = replace(record, converged=np.zeros_like(record.converged)).summary()
    assert "4 of 4 not converged" in line_after(text, "largest λ")
    assert "16 of 16 (all samples and classes) have not converged" in text


def test_what_is_not_valid_is_said():
    text = invalidated(record_of(), FOUR_SAMPLES["one sample"]).summary()
    assert "1 of 4 not valid" in line_after(text, "largest λ")
    assert "1 of 4 samples has no valid Hessian" in text
    assert "disagree with finite differences" in text
    nothing = invalidated(record_of(), FOUR_SAMPLES["all"]).summary()
    assert line_after(nothing, "largest λ").endswith(": not valid.")
    assert "nan" not in nothing


def test_a_zero_hessian():
    text = record_of(activation=nn.ReLU, target="logit").summary()
    assert line_after(text, "linear radius") == "    class 0 (a): ∞."
    assert "A step of length r along it adds 0 · r²" in line_after(text, "largest λ")
    assert "The gradient does not change" in line_after(text, "normalized curvature")
    assert line_after(text, "Gauss–Newton share").endswith(": undefined.")


def test_outputs_of_a_regression_are_no_classes():
    """The closed forms above have a single output; here are three, without labels."""
    torch.manual_seed(0)
    monitor = Measurer([0, 2], "logit", "float64", Options(), heatmap_samples=0)
    record = monitor.measure(mlp(nn.Tanh), Samples(torch.randn(2, 6), None), step=0, logged_step=0, epoch=0)
    text = record.summary()
    assert text.splitlines()[0].endswith("D = 6, output 0, output 2.")
    assert line_after(text, "trace").startswith("    output 0: ")
    assert "class 0" not in text


def test_many_classes_are_counted():
    torch.manual_seed(0)
    monitor = Measurer(list(range(12)), "prob", "float64", Options(), heatmap_samples=0)
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh())
    text = monitor.measure(net, Samples(torch.randn(2, 4), None), step=0, logged_step=0, epoch=0).summary()
    assert "class 9, 2 more." in text.splitlines()[0]
    assert "class 10" not in text


def test_a_record_is_shown_in_a_few_lines():
    text = repr(record_of())
    assert len(text.splitlines()) == 4
    assert "prob, epoch 1, after 7 optimizer steps, dense, curved" in text
    assert "samples × classes: 4 × 2 (0, 2), x (4, 6)" in text
    assert "valid 8 of 8, eigenvalues converged 48 of 48" in text
    record = quadratic_record(3.0, 1.0, -2.0)
    assert "λ -2 to 3, mean trace 2" in repr(record)
    assert "no finite numbers" in repr(invalidated(record_of(), FOUR_SAMPLES["all"]))
    empty = {
        name: getattr(record, name)[:, :0] for name in ("classes", "eigenvalues", "valid", "converged", "gradient")
    }
    none = replace(record, **empty, class_ids=(), metrics={name: a[:, :0] for name, a in record.metrics.items()})
    assert "samples × classes: 1 × 0 ()" in repr(none)


def test_a_spectrum_is_shown_in_a_few_lines():
    spectrum = input_spectrum(lambda x: 0.5 * x**2 @ torch.tensor([3.0, -1.0]), torch.ones(5, 2), classes=0)
    text = repr(spectrum)
    assert len(text.splitlines()) == 4
    assert "logit, dense, curved" in text
    assert "samples × classes: 5 × 1, D = 2" in text
    assert "2 eigenvalues each, λ -1 to 3, mean trace 2" in text
    assert "valid 5 of 5, eigenvalues converged 10 of 10" in text
    nothing = replace(spectrum, eigenvalues=spectrum.eigenvalues * torch.nan)
    assert "no finite numbers" in repr(nothing)
    names = ("eigenvalues", "converged", "valid", "trace", "gradient")
    assert "5 × 0" in repr(replace(spectrum, **{name: getattr(spectrum, name)[:, :0] for name in names}))
