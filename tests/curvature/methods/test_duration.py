"""A limit in seconds, by a clock that moves with the work: what is dropped, in which order, and that it is said."""

import re
from dataclasses import replace

import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp
from torch import nn

from lightning_hessian import input_hessian, input_spectrum
from lightning_hessian.curvature import meter
from lightning_hessian.curvature.algorithms.hutchinson import NUM_VECTORS
from lightning_hessian.curvature.algorithms.lanczos import CHECK_EVERY
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.meter import Pace, TimeLimit, duration
from lightning_hessian.curvature.methods.duration import (
    HOPELESS,
    _rounded_up,
    expected_duration,
    within_limit,
)
from lightning_hessian.curvature.methods.lanczos import CHECKS_IN_MATVECS, MIN_VECTORS, _Allowance
from lightning_hessian.curvature.methods.plan import Plan
from lightning_hessian.curvature.operators import autodiff
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.training.samples import Samples

F64 = torch.float64
CURVED = Diagnosis("curved", "curved")
PIECEWISE_LINEAR = Diagnosis("curved", "piecewise_linear")
SPECTRUM = {"method": "lanczos", "num_eigenvalues": 4}


@pytest.fixture
def clock(monkeypatch):
    """Every HVP of a batch takes one second, and so does a column; nothing else takes any time."""

    class Clock:
        now = 1000.0
        num_columns = 0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(meter, "clock", clock)

    def timed(kind, name, seconds):
        work = getattr(kind, name)

        def method(self, vectors):
            clock.now += seconds(vectors)
            clock.num_columns += len(vectors) if name == "columns" else 0
            return work(self, vectors)

        monkeypatch.setattr(kind, name, method)

    timed(autodiff.ReverseOverReverse, "hvp", lambda v: 1)
    for kind in (autodiff.ForwardOverReverse, autodiff.ReverseOverReverse):
        timed(kind, "columns", len)
    return clock


@pytest.fixture
def case():
    torch.manual_seed(0)
    return mlp(nn.GELU, inputs=200, width=30), torch.randn(2, 200, dtype=F64), 1


def steps_of(found) -> int:
    return found.cost.num_matvecs - NUM_VECTORS - 1  # one with the gradient


def said(found) -> str:
    return " ".join(map(str, found.diagnosis.findings))


def test_with_time_enough_nothing_changes(case, clock):
    free, limited = (input_spectrum(*case, **SPECTRUM, max_seconds=s) for s in (None, 1e4))
    for name in ("eigenvalues", "residuals", "trace", "trace_error", "functional_norm", "diagonal"):
        assert torch.equal(getattr(free, name), getattr(limited, name))
    assert limited.diagnosis == free.diagnosis
    assert free.cost.num_matvecs == limited.cost.num_matvecs


def test_without_a_limit_no_clock_is_read(case, monkeypatch):
    def fail():
        raise AssertionError

    assert TimeLimit().seconds_left == float("inf")
    monkeypatch.setattr(meter, "clock", fail)
    assert Pace(TimeLimit(), 10).lateness(1) is None
    assert TimeLimit().part(0.5).seconds_left == float("inf")


def test_random_vectors_go_before_steps(case, clock):
    free, whole = input_spectrum(*case, **SPECTRUM), input_spectrum(*case, method="dense")
    beside = steps_of(free) + 2 + CHECKS_IN_MATVECS + 1.5  # 3 outputs: as long as 1.5 products
    found = input_spectrum(*case, **SPECTRUM, max_seconds=beside + 7)
    assert torch.equal(found.eigenvalues, free.eigenvalues)
    assert found.converged.all()
    assert found.cost.num_matvecs == steps_of(free) + 7 + 1
    limit = f"{beside + 7:g}"
    assert said(found) == f"To stay within max_seconds={limit}, trace and norms were estimated from 7 random vectors."
    assert (found.trace_error > 0).all()
    assert ((found.trace - whole.trace).abs() <= 5 * found.trace_error).all()


def test_a_random_vector_counts_twice_where_products_with_both_terms_are_made(clock):
    """With more outputs than the basis has vectors, J and A are not formed."""
    torch.manual_seed(0)
    case = mlp(nn.GELU, inputs=200, width=30, outputs=100), torch.randn(2, 200, dtype=F64), 1
    free = input_spectrum(*case, **SPECTRUM)
    beside = steps_of(free) + 2 + CHECKS_IN_MATVECS + 5  # one with JᵀAJ for every eigenvector, one with A
    found = input_spectrum(*case, **SPECTRUM, max_seconds=beside + 14)
    assert "trace and norms were estimated from 7 random vectors." in said(found)


def test_steps_go_last_and_residuals_say_so(case, clock):
    whole = input_spectrum(*case, method="dense")
    found = input_spectrum(*case, **SPECTRUM, max_seconds=24)
    assert not found.converged.all()
    steps = found.cost.num_matvecs - MIN_VECTORS - 1
    assert CHECK_EVERY + 4 < steps < 24 - CHECKS_IN_MATVECS
    assert f"from {MIN_VECTORS} random vectors and Lanczos ended after {steps} steps" in said(found)
    assert "all the same" not in said(found)
    nearest = (found.eigenvalues.unsqueeze(-1) - whole.eigenvalues.unsqueeze(-2)).abs().amin(-1)
    assert (nearest <= found.residuals * (1 + 1e-9)).all()
    assert found.valid.all()


def test_the_least_gives_both_ends(case, clock):
    found = input_spectrum(*case, **SPECTRUM, max_seconds=1e-3)
    assert found.cost.num_matvecs == 4 + CHECK_EVERY + MIN_VECTORS + 1
    assert found.eigenvalues.shape == (2, 1, 4)
    assert (found.lambda_max > found.lambda_min).all()
    late = "The measurement took 14 s, more than max_seconds=0.001, and nothing more could be left out. Measure fewer"
    assert late in said(found)
    assert "heatmaps" not in said(found)  # nobody asked for any


def test_no_heatmaps_are_missed_that_nobody_wanted():
    assert limited(Plan("lanczos", "", CURVED), -1.0, Options(max_seconds=1.0)).dropped == ()


def test_every_group_of_samples_gets_its_share(case, clock, monkeypatch):
    """Two groups of one sample, as large."""
    monkeypatch.setattr("lightning_hessian.curvature.methods.lanczos.group_size", lambda *_: 1)
    found = input_spectrum(*case, **SPECTRUM, max_seconds=48)
    first, second = found.residuals[:, 0]
    assert found.cost.seconds <= 48
    assert (first.max() < found.lambda_max[0, 0]) == (second.max() < found.lambda_max[1, 0])


def test_complete_spectra_give_way_to_their_ends(case, clock):
    found = input_spectrum(*case, max_seconds=150)  # 200 columns
    assert found.method == "lanczos"
    assert not found.complete
    assert clock.num_columns == 50  # two blocks: the first is slower than others may be
    assert "max_seconds=150" in found.reason
    assert said(found) == "To stay within max_seconds=150, only the ends of the spectra were computed."
    assert input_spectrum(*case, max_seconds=300).method == "dense"


@pytest.mark.parametrize("function", [input_hessian, lambda *a, **k: input_spectrum(*a, method="dense", **k)])
def test_whole_matrices_that_were_asked_for_raise_early(case, clock, function):
    with pytest.raises(MeasurementError, match=r"expected to take .* max_seconds=20 leaves 20 s") as error:
        function(*case, max_seconds=20)
    assert clock.num_columns == 25
    assert "method='lanczos'" in str(error.value)
    enough = float(re.search(r"allow max_seconds=(\d+)", str(error.value)).group(1))
    assert 200 < enough <= 250
    function(*case, max_seconds=enough)


def test_no_number_of_samples_fits_a_limit_that_is_over(case, clock):
    def slow(x):
        clock.now += 1
        return case[0](x)

    with pytest.raises(MeasurementError, match=r"leaves 0 s for them\. Use method='lanczos' \(of input_spectrum or"):
        input_hessian(slow, case[1].repeat(999, 1), case[2], max_seconds=0.5)


def record(case, **options):
    monitor = Measurer([1], "logit", "float64", Options(**SPECTRUM, **options), heatmap_samples=1)
    return monitor.measure(case[0], Samples(case[1], None))


def test_heatmaps_go_first(case, clock):
    free = record(case)
    steps = free.num_matvecs
    found = record(case, max_seconds=steps + CHECKS_IN_MATVECS + 50)
    assert found.hessian is None
    assert "no heatmaps were drawn." in found.message
    assert "random vectors" not in found.message
    assert (found.eigenvalues == free.eigenvalues).all()
    assert record(case, max_seconds=steps + CHECKS_IN_MATVECS + 250).hessian is not None
    least = record(case, max_seconds=20)
    assert re.search("no heatmaps were drawn, trace and norms .* and Lanczos ended after", least.message)


def test_a_resumed_run_knows_what_fits_from_an_hvp_of_its_own(case, clock, monkeypatch):
    """Checkpoints hold what the network is, but not how long an HVP took, perhaps on another device."""
    of_outputs = autodiff.ReverseOverReverse.hvp_of_outputs

    def timed(self, weights, v):
        clock.now += 1
        return of_outputs(self, weights, v)

    monkeypatch.setattr(autodiff.ReverseOverReverse, "hvp_of_outputs", timed)
    options = Options("lanczos", 4, density_vectors=3, max_seconds=100.0)
    monitor = Measurer([1], "logit", "float64", options, heatmap_samples=0)
    for _ in range(2):
        found = monitor.measure(case[0], Samples(case[1], None))
        assert "the density was not estimated" in found.message
        assert found.seconds < 100
        assert found.network == "curved"
        monitor.state.seconds_per_matvec = None


def batch(num_inputs=300, num_samples=4):
    classes = torch.zeros(num_samples, 1, dtype=torch.long)
    x = torch.randn(num_samples, num_inputs, dtype=F64)
    return TargetBatch(mlp(nn.GELU, num_inputs), lambda z, c: z.gather(1, c), x, classes)


def limited(plan, left, options=None, seconds=1.0):
    of = batch()
    options = options or Options(max_seconds=left)
    return within_limit(plan, of, ModelCosts(of), options, seconds_per_matvec=seconds, seconds_left=left)


def test_what_surely_does_not_fit_is_not_begun():
    dense, columns = Plan("dense", "", CURVED), 0.7 * 300
    assert limited(dense, 1.01 * columns / HOPELESS) is dense
    assert limited(dense, 0.99 * columns / HOPELESS).method == "lanczos"
    asked = Options("dense", max_seconds=1.0)
    assert limited(dense, 1.0, asked) is dense
    heatmaps = Plan("lanczos", "", CURVED, num_matrices=1)
    assert limited(heatmaps, 1.01 * columns / 4 / HOPELESS).num_matrices == 1
    assert limited(heatmaps, 0.99 * columns / 4 / HOPELESS).num_matrices == 0
    gradients = Plan("low_rank", "", PIECEWISE_LINEAR)
    assert limited(gradients, 1.0) is gradients  # C = 3: fewer than Lanczos needs


def test_the_density_takes_what_is_left():
    ends, options = Plan("lanczos", "", CURVED), Options(max_seconds=1.0, density_vectors=5)
    least = 1.1 * 93
    assert limited(ends, least + 201, options) is ends
    found = limited(ends, least + 125, options)
    assert (found.density_vectors, found.dropped) == (3, ("the density was estimated from 3 starting vectors",))
    found = limited(ends, least + 79, options)
    assert (found.density_vectors, found.dropped) == (0, ("the density was not estimated",))


def test_fewer_vectors_of_the_density_are_said(case, clock, monkeypatch):
    free = input_spectrum(*case, **SPECTRUM, density_vectors=3)
    monkeypatch.setattr(
        "lightning_hessian.curvature.functions.within_limit",
        lambda plan, *_, **__: replace(plan, density_vectors=2, dropped=("there are 2",)),
    )
    found = input_spectrum(*case, **SPECTRUM, density_vectors=3, max_seconds=1e4)
    assert (free.density.nodes.shape[2], found.density.nodes.shape[2]) == (3, 2)
    assert said(found) == "To stay within max_seconds=10000, there are 2."


def test_where_nothing_is_known_nothing_is_dropped():
    plan = Plan("dense", "", CURVED, num_matrices=1)
    assert limited(plan, 1e-9, seconds=None) is plan
    assert limited(plan, float("inf"), Options()) is plan
    zero = Plan("low_rank", "", Diagnosis("linear", "linear"))
    assert limited(zero, 1e-9) is zero


def test_what_a_measurement_is_expected_to_take():
    of, heatmaps = batch(), Plan("lanczos", "", CURVED, num_matrices=2)
    costs = ModelCosts(of)
    assert expected_duration(heatmaps, of, costs, Options(), 2.0) == pytest.approx(2 * (1.1 * 93 + 0.7 * 300 / 2))
    assert expected_duration(Plan("low_rank", "", PIECEWISE_LINEAR), of, costs, Options(), 2.0) == 3.0
    assert expected_duration(Plan("low_rank", "", Diagnosis("linear", "linear")), of, costs, Options(), 2.0) == 0


def test_a_slow_first_part_is_not_taken_for_the_pace():
    now = [0.0]

    class At(TimeLimit):
        @property
        def seconds_left(self):
            return self.max_seconds - now[0]

    pace = Pace(At(100.0), 100)
    now[0] = 20.0
    assert pace.lateness(10) is None  # at that pace 200 s, but a third of it may come from the start
    now[0] = 25.0
    assert pace.lateness(20) is None
    assert pace.lateness(20, seconds_after=40.0) == (105.0, 100.0)
    now[0] = 40.0
    assert pace.lateness(30) == (40 + 70.0, 100.0)
    assert pace.lateness(100, seconds_after=1000.0) is None  # all is done
    now[0] = 41.0
    assert pace.lateness(10) is not None  # begun again by another mode: the pace is looked at anew


@pytest.mark.parametrize("value", [0, -1.0, True, "10", float("nan"), float("inf")])
def test_what_is_no_limit_raises(value):
    with pytest.raises(ConfigurationError, match=r"max_seconds=.* must be a positive number of seconds, or None"):
        Options(max_seconds=value)


def test_seconds_in_words():
    assert [duration(s) for s in (0.123, 9.96, 99, 720, 12600)] == ["0.12 s", "10 s", "99 s", "12 min", "3.5 h"]
    assert [duration(s) for s in (99.4, 99.6, 123, 5964, 5988)] == ["99 s", "1.7 min", "2 min", "99 min", "1.66 h"]


def test_the_limit_that_would_do_is_given_to_two_digits():
    assert [_rounded_up(seconds) for seconds in (8.1, 81, 0.13)] == ["9.8", "98", "0.16"]


def test_what_fits_is_estimated_from_the_first_product_on(clock):
    allowance = _Allowance(TimeLimit(2.0, clock.now))
    assert allowance.fitting() == float("inf")  # nothing is known yet
    clock.now += 0.5
    allowance.num_products = 2
    assert allowance.fitting() == 6
    assert allowance.fitting(reserved=4) == 2
