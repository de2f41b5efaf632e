"""What the examples on regularization and known results are made of: statistics over seeds, and ways of training."""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp
from torch import nn

from lightning_hessian import input_hessian, input_spectrum

EXAMPLES = Path(__file__).parent.parent / "examples"
LOWER, HIGHER = np.array([1.0, 1.1, 1.2]), np.array([2.0, 2.3, 2.4])


@pytest.fixture
def example(monkeypatch):
    """A module among the examples, by its name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    before = set(sys.modules)
    yield import_module
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(EXAMPLES)):
            del sys.modules[name]


def test_an_estimate_has_the_interval_of_students_t(example):
    estimate = example("experiments.over_seeds").Estimate.of(HIGHER)
    expected = ttest_1samp(HIGHER, 0).confidence_interval(0.95)
    assert estimate.interval == pytest.approx((expected.low, expected.high))
    assert estimate.error == pytest.approx(HIGHER.std(ddof=1) / np.sqrt(3))


def test_a_claim_is_judged_by_its_interval(example):
    claim = example("experiments.over_seeds").Claim
    assert claim.lower("", HIGHER, LOWER).verdict == "as published"
    assert claim.lower("", LOWER, HIGHER).verdict == "**opposite**"
    assert claim.higher("", LOWER, HIGHER, "expected").verdict == "as expected"
    assert claim.higher("", HIGHER, LOWER).verdict == "**opposite**"
    assert claim.higher("", LOWER, LOWER[::-1]).verdict == "not seen"
    assert claim.gain("", LOWER, HIGHER).verdict == "as published"
    assert claim.gain("", HIGHER, LOWER).verdict == "**opposite**"
    assert claim.gain("", HIGHER, LOWER, at_least=-200).verdict == "as published"
    assert claim.gain("", LOWER, LOWER[::-1]).verdict == "not seen"


def test_attacks_stay_within_their_radius_and_raise_the_loss(example):
    training = example("experiments.training")
    torch.manual_seed(0)
    model, x, y = training.cnn(nn.GELU), torch.rand(8, 1, 14, 14), torch.arange(8)
    near = training.attacked(model, x, y, 5)
    assert (near - x).abs().max() <= training.RADIUS + 1e-6
    assert training.plain(model, near, y) > training.plain(model, x, y)


def test_layers_of_low_curvature_are_what_they_say(example):
    training = example("experiments.training")
    act = training.CenteredSoftplus()
    at_zero = torch.zeros(1, 1)
    assert act(at_zero).item() == pytest.approx(0, abs=1e-7)
    assert input_hessian(act, at_zero, 0).item() == pytest.approx(5 / 4, rel=1e-5)  # β / 4
    norm = training.LipschitzBatchNorm(2).eval()
    norm.running_var.copy_(torch.tensor([4.0, 1e-6]))
    slopes = norm(torch.ones(1, 2, 1, 1)) - norm(torch.zeros(1, 2, 1, 1))
    assert slopes.max().item() == pytest.approx(10, rel=1e-5)  # what is learned starts at 10


def test_cure_penalizes_the_curvature_along_the_gradients_sign(example):
    """For a quadratic loss, the gradient changes by H · hz exactly."""
    training = example("experiments.training")
    hessian = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    training.cross_entropy = lambda z, y, reduction="mean": z.sum()
    model = lambda x: 0.5 * torch.einsum("ni,ij,nj->n", x.flatten(1), hessian, x.flatten(1))  # noqa: E731
    x = torch.ones(1, 1, 2, 2)
    step = training.CURE_STEP / 2 * torch.ones(4)  # the unit vector along the gradient's sign
    expected = model(x).sum() + training.CURE_WEIGHT * (hessian @ step).square().sum()
    assert training.cure(model, x, torch.zeros(1)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_hessian_of_softplus_scales_with_beta_and_that_of_relu_is_zero(example):
    known = example("known_results")
    torch.manual_seed(0)
    network, x, y = known.training.cnn(nn.ReLU), torch.rand(3, 1, 14, 14), torch.arange(3)
    for beta in (3.0, 50.0):
        assert known.distance_from_scaling(network, x, y, beta) < 1e-12
    relu = input_spectrum(network, x, y)
    assert relu.diagnosis.kind == "piecewise_linear"
    assert not relu.eigenvalues.any()
    smooth = input_spectrum(known.with_softplus(network, 3.0), x, y)
    assert (smooth.spectral_norm > 0).all()


def test_the_table_of_regularization_names_what_changed(example):
    regularization = example("regularization")
    same = dict.fromkeys(regularization.TITLES, LOWER)
    table = regularization.table({"none": same, "dropout": same | {"fgsm": HIGHER}})
    differences = table.split("same seed:\n")[1].splitlines()
    assert [line.split()[-1] for line in differences] == ["distinguishable"] * 6 + ["higher"]
    assert "1.100 ± 0.058" in table
