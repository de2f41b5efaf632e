"""What is chosen, with given times instead of the clock's; and what the error suggests where nothing fits."""

import re

import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp
from torch import nn

from lightning_hessian import MeasurementError, input_spectrum
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import LANCZOS_OVERHEAD, ModelCosts
from lightning_hessian.curvature.methods import plan as planning
from lightning_hessian.curvature.methods import timing
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
    ("shape", "matvec", "column", "method"),
    [
        ((8, 1, 3072), 0.1, 0.1, "lanczos"),  # 307 s against 11 s
        ((8, 1, 3072), 0.1, 0.004, "dense"),  # 12 s for the columns of blocks, 2 s for eigenvectors
        ((8, 1, 300), 0.1, 0.1, "lanczos"),  # 30 s against 11 s
        ((8, 1, 200), 0.1, 0.1, "dense"),  # 20 s: less than twice as much
        ((8, 1, 784), 0.0006, 0.0006, "dense"),  # 0.86 s against 0.07 s: below a second
    ],
)
def test_the_whole_spectrum_where_it_is_worth_it(shape, matvec, column, method):
    plan = cheaper(shape, Options(), matvec, column, eigh_seconds=1e-11, diagnosis=CURVED)
    expected = shape[2] * column + shape[0] * shape[1] * 1e-11 * shape[2] ** 3
    assert plan.expected_seconds["dense"] == pytest.approx(expected)
    # a basis of 81, 10 random vectors, gradient and prediction
    assert plan.expected_seconds["lanczos"] == pytest.approx(LANCZOS_OVERHEAD * 93 * matvec)
    assert plan.method == method
    assert plan.seconds_per_matvec == matvec
    assert plan.reuse_for_run
    assert f"{matvec:.2g} s per" in plan.reason


def test_block_size_and_density_cost_matvecs():
    def lanczos(**options):
        plan = cheaper((1, 1, 2000), Options(**options), 1.0, 1.0, 0.0, diagnosis=CURVED)
        return plan.expected_seconds["lanczos"] / LANCZOS_OVERHEAD

    assert lanczos() == pytest.approx(93)
    assert lanczos(block_size=30) == pytest.approx(93 + (3 * 30 + 30) - 81)
    assert lanczos(density_vectors=5) == pytest.approx(93 + 5 * 40)


def test_columns_for_heatmaps_are_paid_by_lanczos_too():
    few, some = (cheaper((4, 1, 400), Options(), 0.1, 0.1, 0.0, s, diagnosis=CURVED) for s in (0, 2))
    assert (few.method, some.method) == ("lanczos", "dense")  # 40 s against 11 s, or 12 and 20
    assert some.expected_seconds["lanczos"] == pytest.approx(few.expected_seconds["lanczos"] + 20)


def test_matrices_of_every_sample_are_dense(monkeypatch):
    monkeypatch.delattr(planning, "seconds_per_matvec")
    assert planned(batch(300), CURVED, num_matrices=2).method == "dense"
    assert planned(batch(300), CURVED, Options(max_memory=4_000_000), num_matrices=2).method == "lanczos"


def planned(given, diagnosis, options=Options(), **how):  # noqa: B008 # frozen
    return make_plan(given, ModelCosts(given), diagnosis, options, **how)


@pytest.mark.parametrize(("seconds", "method"), [(1e-6, "dense"), (1.0, "lanczos")])
def test_the_clock_decides_above_256_inputs(monkeypatch, seconds, method):
    for name in ("matvec", "column"):
        monkeypatch.setattr(planning, f"seconds_per_{name}", lambda *_: seconds)
    plan = planned(batch(700), CURVED)
    assert (plan.method, plan.seconds_per_matvec) == (method, seconds)


def test_what_needs_no_clock(monkeypatch):
    monkeypatch.delattr(planning, "seconds_per_matvec")
    assert planned(batch(256), CURVED).method == "dense"
    assert planned(batch(700), CURVED, previous_method="lanczos").method == "lanczos"
    assert planned(batch(700), CURVED, previous_method="dense").method == "dense"
    assert planned(batch(700, nn.ReLU), PIECEWISE_LINEAR, previous_method="dense").method == "low_rank"
    little = planned(batch(700), CURVED, Options(max_memory=10_000_000), previous_method="dense")
    assert little.method == "lanczos"
    assert "the whole matrices need 22" in little.reason


def test_the_time_of_a_matvec_is_of_the_whole_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "_seconds", lambda work: seen.append(len(work())) or float(len(seen)))
    few = batch(6).repeat(8)
    costs = ModelCosts(few)
    assert timing.seconds_per_matvec(few, costs, 4 * costs.matvec_bytes, torch.Generator()) == 2.0 * 16 / 4
    assert seen == [4, 4, 4]


def test_a_monitor_uses_the_method_of_its_first_curved_measurement_again(monkeypatch):
    for name in ("matvec", "column"):
        clock = iter([1e-6])  # a second look at it fails
        monkeypatch.setattr(planning, f"seconds_per_{name}", lambda *_, clock=clock: next(clock))
    monitor = Measurer(0, "logit", "float64", Options(num_eigenvalues=2), heatmap_samples=0)
    samples, when = Samples(torch.randn(1, 260, dtype=F64), None), {"step": 0, "logged_step": 0, "epoch": 0}
    relu = monitor.measure(mlp(nn.ReLU, 260), samples, **when)
    assert (relu.method, monitor.state.method) == ("low_rank", None)
    first, second = (monitor.measure(mlp(nn.GELU, 260), samples, **when) for _ in range(2))
    assert (first.method, second.method, monitor.state.method) == ("dense", "dense", "dense")
    assert first.made_with["seconds_per_matvec"] == 1e-6
    assert first.made_with["expected_seconds"].keys() == {"dense", "lanczos"}
    assert "1e-06 s per Hessian-vector product" in first.reason
    assert "as in the first measurement" in second.reason


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
