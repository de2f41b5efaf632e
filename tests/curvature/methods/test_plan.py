"""What is chosen, with given times instead of the clock's; and what the error suggests where nothing fits."""

import re

import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp
from torch import nn

from lightning_hessian import MeasurementError, input_spectrum
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import (
    COLUMN_IN_MATVECS,
    LANCZOS_OVERHEAD,
    ModelCosts,
    expected_work,
    lanczos_bytes,
    low_rank_bytes,
)
from lightning_hessian.curvature.methods.plan import cheaper, make_plan
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.training.samples import Samples

F64 = torch.float64
CURVED, PIECEWISE_LINEAR = Diagnosis("curved", "curved"), Diagnosis("curved", "piecewise_linear")


def batch(inputs: int, activation: type[nn.Module] = nn.GELU) -> TargetBatch:
    classes = torch.zeros(2, 1, dtype=torch.long)
    return TargetBatch(mlp(activation, inputs), lambda z, c: z.gather(1, c), torch.randn(2, inputs, dtype=F64), classes)


@pytest.mark.parametrize(
    ("shape", "num_matrices", "method"),
    [
        ((8, 1, 3072), 0, "lanczos"),
        ((8, 1, 400), 0, "lanczos"),  # as many as 280 HVPs against 102
        ((8, 10, 400), 0, "dense"),  # 154: the classes share the tangents
        ((8, 1, 290), 0, "dense"),  # 0.7 · 292 HVPs against twice 1.1 · 93
        ((8, 1, 294), 0, "lanczos"),
        ((4, 1, 500), 0, "lanczos"),
        ((4, 1, 500), 2, "dense"),  # 350 against 277: columns for heatmaps are paid by lanczos too
    ],
)
def test_the_whole_spectrum_where_it_is_worth_it(shape, num_matrices, method):
    plan = cheaper(shape, Options(), num_matrices, diagnosis=CURVED)
    num_samples, num_classes, num_inputs = shape
    columns = num_inputs * COLUMN_IN_MATVECS * (1 + num_classes) / (2 * num_classes)
    # a basis of 81, 10 random vectors, gradient and prediction
    ends = LANCZOS_OVERHEAD * 93 + num_matrices / num_samples * columns
    assert plan.method == method
    assert f"{columns:.0f} Hessian-vector products and its ends {ends:.0f}" in plan.reason
    assert plan.reuse_for_run


def test_block_size_and_density_cost_matvecs():
    def lanczos(**options):
        return expected_work((1, 1, 2000), Options(**options))["lanczos"] / LANCZOS_OVERHEAD

    assert lanczos() == pytest.approx(93)
    assert lanczos(block_size=30) == pytest.approx(93 + (3 * 30 + 30) - 81)
    assert lanczos(density_vectors=5) == pytest.approx(93 + 5 * 40)


def test_matrices_of_every_sample_are_dense():
    assert planned(batch(400), CURVED, num_matrices=2).method == "dense"
    assert planned(batch(400), CURVED, Options(max_memory=4_000_000), num_matrices=2).method == "lanczos"


def planned(given, diagnosis, options=Options(), **how):  # noqa: B008 # frozen
    return make_plan(given, ModelCosts(given), diagnosis, options, **how)


def test_what_work_does_not_decide():
    assert planned(batch(256), CURVED).method == "dense"
    assert planned(batch(700), CURVED).method == "lanczos"
    assert planned(batch(700), CURVED, previous_method="lanczos").method == "lanczos"
    assert planned(batch(700), CURVED, previous_method="dense").method == "dense"
    assert planned(batch(700, nn.ReLU), PIECEWISE_LINEAR, previous_method="dense").method == "low_rank"
    little = planned(batch(700), CURVED, Options(max_memory=10_000_000), previous_method="dense")
    assert little.method == "lanczos"
    assert "the whole matrices need 22" in little.reason


def test_a_monitor_uses_the_method_of_its_first_curved_measurement_again(monkeypatch):
    monitor = Measurer(0, "logit", "float64", Options(num_eigenvalues=2), heatmap_samples=0)
    samples, when = Samples(torch.randn(1, 600, dtype=F64), None), {"step": 0, "logged_step": 0, "epoch": 0}
    relu = monitor.measure(mlp(nn.ReLU, 600), samples, **when)
    assert (relu.method, monitor.state.method) == ("low_rank", None)
    first, second = (monitor.measure(mlp(nn.GELU, 600), samples, **when) for _ in range(2))
    assert (first.method, second.method, monitor.state.method) == ("lanczos", "lanczos", "lanczos")
    assert "Hessian-vector products" in first.reason
    assert "as in the first measurement" in second.reason


def test_a_monitor_that_began_with_whole_spectra_goes_on_with_them(monkeypatch):
    """Though there is no longer memory for the heatmaps that made them worth their cost."""
    monitor = Measurer(0, "logit", "float64", Options(num_eigenvalues=2), heatmap_samples=2)
    samples = Samples(torch.randn(2, 400, dtype=F64), None)
    first = monitor.measure(mlp(nn.GELU, 400), samples)
    monkeypatch.setattr(Options, "memory", lambda *_: 12_000_000)
    second = monitor.measure(mlp(nn.GELU, 400), samples)
    assert (first.method, second.method, first.hessian is None, second.hessian is None) == (
        "dense",
        "dense",
        False,
        True,
    )
    found = re.search(
        r"Whole matrices .* so no heatmap is drawn. Set heatmap_samples=0, or max_memory=(\d+)", second.message
    )
    assert int(found.group(1)) > 12_000_000


@pytest.mark.parametrize("method", ["dense", "lanczos", "low_rank"])
def test_what_is_suggested_where_nothing_fits_does_fit(method):
    net, x = mlp(nn.ReLU, inputs=60, outputs=8), torch.randn(3, 60, dtype=F64)
    with pytest.raises(MeasurementError, match="Allow max_memory") as error:
        input_spectrum(net, x, "all", "prob", method=method, max_memory=5_000)
    enough = int(re.search(r"max_memory=(\d+)", str(error.value)).group(1))
    whole = input_spectrum(net, x, "all", "prob", method=method, num_eigenvalues=10)
    found = input_spectrum(net, x, "all", "prob", method=method, num_eigenvalues=10, max_memory=enough)
    torch.testing.assert_close(found.lambda_max, whole.lambda_max, rtol=1e-4, atol=1e-9)
    with pytest.raises(MeasurementError, match="Measure 7 classes at most, or measure 2 samples"):
        input_spectrum(net, x, "all", "prob", method=method, max_memory=enough - 1)
    input_spectrum(net, x, list(range(7)), "prob", method=method, max_memory=enough - 1)
    input_spectrum(net, x[:2], "all", "prob", method=method, max_memory=enough - 1)


def test_another_method_is_suggested_where_it_fits():
    net, x = mlp(inputs=700), torch.randn(2, 700, dtype=F64)
    with pytest.raises(MeasurementError, match=r"method='dense' needs 22.* MiB .*Use method='lanczos', or allow"):
        input_spectrum(net, x, 0, method="dense", max_memory=10_000_000)
    assert input_spectrum(net, x, 0, method="lanczos", max_memory=10_000_000).converged.all()


def test_the_memory_of_low_rank_counts_what_is_as_large_as_the_jacobian():
    wide = batch(400)
    costs = ModelCosts(wide)
    jacobian = costs.num_outputs * 400 * 8
    assert low_rank_bytes(costs) >= 10 * jacobian  # of one class: J, Q and R, and products with both


def test_lanczos_finds_two_pairs_at_least_and_has_room_for_them():
    costs = ModelCosts(batch(400))
    one, two, three = (lanczos_bytes(costs, Options(num_eigenvalues=n)) for n in (1, 2, 3))
    assert one == two < three
