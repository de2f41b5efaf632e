"""Checks of whole measurements: what is wrong is found at every step of a run, and never blamed on what is right."""

import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from support.measuring import Measurer
from support.networks import custom_function
from torch import nn

from lightning_hessian import input_gradient, input_hessian, input_spectrum
from lightning_hessian.curvature.checks.certificate import certify
from lightning_hessian.curvature.checks.coupling import is_coupled
from lightning_hessian.curvature.checks.diagnosis import Finding, joined
from lightning_hessian.curvature.checks.prediction import Prediction, predict, predict_slope
from lightning_hessian.curvature.checks.result_check import CheckSettings, checked
from lightning_hessian.curvature.checks.verdict import TURNS, unchecked
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.training.samples import Samples

F64 = torch.float64


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=F64).to(dtype)


def quietly(function, *arguments, **named):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **named)


def records_of(model, x, *, steps=4, target="logit", **options):
    """The records of a run of some measurements."""
    options = Options(**options)
    measurer = Measurer(0, target, "float64" if x.dtype == F64 else "float32", options, heatmap_samples=0)
    return [quietly(measurer.measure, model, Samples(x, None), step=step) for step in range(steps)]


# The second derivative that autograd sees is zero where x > 1.
hides_curvature = custom_function(lambda x: x**2, lambda x: torch.where(x > 1, 2 * x.detach(), 2 * x))


def test_what_is_wrong_stays_so_at_every_later_measurement():
    """The step at which a check failed is not where the next begins: there, noise would hide all curvature."""
    x = torch.tensor([[0.3, 0.5], [1.5, 1.7], [0.2, 0.1]], dtype=F64)
    for record in records_of(lambda x: hides_curvature(x).sum(1), x, steps=5):
        assert record.valid[:, 0].tolist() == [True, False, True]


def test_a_hessian_that_is_wrongly_zero_is_not_certified_by_noise():
    x, zero = torch.tensor([[1.5, 1.7]], dtype=F64), torch.zeros(1, 1, dtype=F64)
    gradient = 2 * x.unsqueeze(1)
    batch = TargetBatch(lambda x: (x**2).sum(1, keepdim=True), lambda z, _: z, x, torch.zeros(1, 1).long())
    for step in (1e-7, 1e-8):
        predicted = predict(gradient, torch.zeros_like(gradient), zero, lambda w: zero, generator())
        found = certify(batch, predicted, 4, torch.full((1,), step, dtype=F64))
        assert not found.is_outcome("certified").any(), step


class WrongTangent(torch.autograd.Function):
    """sin²x, whose forward-mode derivative is wrong."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin() ** 2

    @staticmethod
    def setup_context(ctx, inputs, output):
        (x,) = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return gradient * WrongSine.apply(2 * x)

    @staticmethod
    def jvp(ctx, tangent):
        (x,) = ctx.saved_tensors
        return tangent * (2 * x).sin()


class WrongSine(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, tangent):
        return 3 * tangent * ctx.saved_tensors[0].cos()


def test_what_is_reported_on_a_kink_is_what_was_confirmed_beside_it(monkeypatch):
    monkeypatch.setattr(ModelCosts, "calls_dominate", False)  # tensors this small are left to reverse mode
    x = torch.tensor([[0.3, 0.3, 0.9, 0.4]], dtype=F64)  # |x0 - x1| has its kink here
    expected = torch.diag(2 * (2 * x[0]).cos())

    def model(x):
        return WrongTangent.apply(x).sum(1) + (x[:, 0] - x[:, 1]).abs()

    spectrum = quietly(input_spectrum, model, x, 0, method="dense")
    assert bool(spectrum.valid.all())
    assert torch.allclose(spectrum.eigenvalues[0, 0], torch.linalg.eigvalsh(expected).flip(0))
    assert "computed again by reverse_over_reverse" in spectrum.diagnosis.message
    assert "kink" in spectrum.diagnosis.message
    assert bool(spectrum.finite_difference_error.isfinite().all())  # that of the neighbor


def test_what_is_wrong_on_one_side_of_a_kink_is_found_where_all_inputs_are_equal():
    """Neighbors lie on both sides of a sample, also where data have no range that they could be kept in."""
    spectrum = quietly(
        input_spectrum, lambda x: hides_curvature(x).sum(1) + (x - 1).abs().sum(1), torch.ones(2, 8, dtype=F64), 0
    )
    assert not spectrum.valid.any()


class RefusesOnce(nn.Module):
    """A forward that accepts no inputs but the samples while the first measurement lasts."""

    def __init__(self, x):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=F64))
        self.x, self.refuses = x, True

    def forward(self, x):
        if self.refuses and not all((row == self.x).all(1).any() for row in x):
            raise ValueError("not one of the samples")
        return (self.weight * x).sin().sum(1)


def test_samples_that_could_not_be_confirmed_are_compared_at_themselves_the_next_time():
    x = random(3, 2)
    model = RefusesOnce(x)
    options = Options()
    measurer = Measurer(0, "logit", "float64", options, heatmap_samples=0)
    first = quietly(measurer.measure, model, Samples(x, None), step=0)
    assert "could not confirm" in first.message
    model.refuses = False
    later = [quietly(measurer.measure, model, Samples(x, None), step=step) for step in range(1, 5)]
    assert sum(torch.tensor(record.finite_difference_error).isfinite().sum() for record in later) >= 3
    assert "could not confirm" not in later[-1].message


def test_samples_coupled_in_a_forward_of_one_batch_size_are_found():
    matrix = random(3, 3, dtype=torch.float32)
    spectrum = quietly(
        input_spectrum, lambda x: (matrix @ x).pow(3).sum(1), random(3, 4, dtype=torch.float32, seed=1), 0
    )
    assert not spectrum.valid.any()
    assert "changes with the other samples" in spectrum.diagnosis.message


def test_coupling_is_found_where_the_forward_accepts_a_range_only():
    def model(x):
        assert x.min() >= 0
        assert x.max() <= 1
        return (x - x.mean(0)).pow(3).sum(1)

    x = torch.rand(4, 5, generator=generator(), dtype=F64)
    x[:, 0], x[:, 1] = 0, 1
    spectrum = quietly(input_spectrum, model, x, 0)
    assert "changes with the other samples" in spectrum.diagnosis.message


class Scaled(torch.autograd.Function):
    """v ↦ v with a gradient whose derivative is ``factor`` times too large."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return Scaled.apply(gradient, ctx.factor) if ctx.factor == 1 else Larger.apply(gradient, ctx.factor), None


class Larger(torch.autograd.Function):
    @staticmethod
    def forward(ctx, g, factor):
        ctx.factor = factor
        return g.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


class TooLarge(nn.Module):
    """Outputs of a small network, whose Hessians autograd takes to be too large."""

    def __init__(self, num_outputs, factor, size=100):
        super().__init__()
        self.factor = factor
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(size, 40), nn.Tanh(), nn.Linear(40, num_outputs))

    def forward(self, x):
        return self.net(Scaled.apply(x, self.factor))


@pytest.mark.parametrize("num_classes", [1, 10, 50])
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_errors_are_seen_however_many_classes_share_a_direction(num_classes, method):
    x = random(2, 100, dtype=torch.float32)
    classes = list(range(num_classes))
    spectrum = quietly(input_spectrum, TooLarge(50, 1.2), x, classes, method=method, num_eigenvalues=2)
    assert not spectrum.valid.any()


def test_opposite_classes_do_not_cancel_in_the_direction_of_the_check():
    gradient, top = random(1, 1, 300), random(1, 1, 300, seed=1)
    both = [torch.cat([v, -v], dim=1) for v in (gradient, top)]
    one = torch.ones(1, 2, dtype=F64)
    for seed in range(6):
        found = predict(*both, one, lambda w: one, generator(seed))
        assert found.slope.abs().min() / gradient.norm() > 0.3, seed


def test_zero_hessians_of_one_class_are_no_underflow_where_another_is_curved():
    x = random(3, 4, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hessians = input_hessian(lambda x: torch.stack([x.sum(1), (x**2).sum(1)], 1), x, [0, 1])
    assert not hessians[:, 0].any()


def test_a_forward_that_accepts_a_range_only_is_measured_on_a_kink_at_every_step():
    def model(x):
        assert x.min() >= 0
        assert x.max() <= 1
        pairs = x.unflatten(1, (-1, 2))
        return (pairs.amax(2) ** 3).sum(1)

    x = torch.rand(2, 8, generator=generator(), dtype=F64)
    x[:, :2], x[:, 2:4] = 0, 1  # ties at both ends of the range
    for record in records_of(model, x, steps=4):
        assert record.valid.all()


def test_a_later_sample_that_is_computed_again_leaves_the_matrices_of_the_first():
    """The kernel is wrong for the last sample only, of which no matrix is wanted."""

    class WrongForOne(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=F64))

        def forward(self, x):
            factor = 1.3 if len(x) == 3 and x.requires_grad else 1.0  # wrong in the batch that is measured
            marked = x[:, :1] > 10
            return (self.weight * torch.where(marked, Scaled.apply(x, factor), x)).sin().sum(1)

    x = random(3, 4)
    x[2, 0] = 11
    options = Options(method="lanczos", num_eigenvalues=2)
    measurer = Measurer(0, "logit", "float64", options, heatmap_samples=1)
    record = quietly(measurer.measure, WrongForOne(), Samples(x, None))
    assert record.valid.all()
    assert "computed again" in record.message
    assert record.hessian.shape == (1, 1, 4, 4)


def test_the_same_warning_is_given_once_for_samples_that_are_not_finite():
    x = random(3, 2)
    x[1, 0] = torch.nan
    options = Options()
    measurer = Measurer(0, "logit", "float64", options, heatmap_samples=0)
    counts = []
    for step in range(3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            measurer.measure(lambda x: x.sin().sum(1), Samples(x, None), step=step)
        counts.append(sum("not valid" in str(w.message) for w in caught))
    assert counts == [1, 0, 0]


def test_a_finding_about_all_samples_stays_one_about_all():
    both = joined([Finding("s"), Finding("s", (3,), lasts=True)])
    assert both == (Finding("s", (), lasts=True),)


def test_the_error_of_a_zero_hessian_does_not_depend_on_the_scale_of_the_input():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(10, 30), nn.ReLU(), nn.Linear(30, 3)).double()
    for scale in (1e-4, 1.0, 1e4):
        spectrum = quietly(input_spectrum, net, scale * random(3, 10), 0)
        assert spectrum.finite_difference_error.nan_to_num(0).max() < 1e-2, scale


def test_what_could_not_be_confirmed_in_float32_is_looked_at_again():
    """Values that are noisy at every step: rounded to a hundredth."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, x):
            smooth = (self.weight * x).sin().sum(1)
            return smooth + (1e3 * x).sin().sum(1).detach().mul(1e4).sin() * 1e-2

    records = records_of(Noisy(), random(3, 4, dtype=torch.float32), steps=4)
    assert all("could not confirm" in record.message for record in records)


def test_what_is_said_of_a_sample_is_what_was_found_when_it_was_last_checked():
    """At first, values are too noisy; then every sample is seen to lie on a kink, beside which it is confirmed."""

    class Settles(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.noise = nn.Parameter(torch.ones(4, dtype=F64)), 1e-2

        def forward(self, x):
            smooth = (self.weight * x).sin().sum(1) + (x[:, 0] - x[:, 1]).abs()
            return smooth + self.noise * (1e12 * x.detach()).sin().sum(1)

    model, x = Settles(), random(3, 4)
    x[:, 1] = x[:, 0]
    measurer = Measurer(0, "logit", "float64", Options(), heatmap_samples=0)
    records = [quietly(measurer.measure, model, Samples(x, None), step=0)]
    assert "could not confirm the numbers at samples 0, 1 and 2" in records[0].message
    model.noise = 0.0
    records = [quietly(measurer.measure, model, Samples(x, None), step=step) for step in range(1, 5)]
    assert "kink at samples 0, 1 and 2" in records[-1].message
    assert "could not confirm" not in records[-1].message
    assert records[-1].valid.all()


@pytest.mark.parametrize("num_samples", [2, 4])
@pytest.mark.parametrize(
    "model",
    [
        lambda x: (x - x.mean(0)).pow(2).sum(1),
        lambda x: (x - x.mean(0).detach()).pow(3).sum(1),
        lambda x: x.tanh().cumsum(0).sum(1),
    ],
    ids=["mean", "detached mean", "causal"],
)
def test_samples_that_share_a_mean_or_depend_on_those_before_them_are_coupled(model, num_samples):
    x = random(num_samples, 5)
    with pytest.warns(UserWarning, match="changes with the other samples"):
        input_gradient(model, x, 0)
    spectrum = quietly(input_spectrum, model, x, 0)
    assert not spectrum.valid.any()
    assert "changes with the other samples" in spectrum.diagnosis.message
    assert "This is correct" not in spectrum.diagnosis.message


def test_a_target_that_couples_samples():
    with pytest.warns(UserWarning, match="changes with the other samples"):
        input_hessian(nn.Linear(5, 2), random(3, 5, dtype=torch.float32), 0, lambda z, c: (z - z.mean(0))[:, :1] ** 2)


def test_a_gradient_that_lacks_a_part_is_found_in_many_dimensions():
    x, c = random(2, 300), random(300, seed=1)
    with pytest.warns(UserWarning, match="Finite differences contradict the gradient"):
        input_gradient(lambda x: (3 * x).sin().sum(1) + x.detach() @ c, x, 0)


@dataclass(frozen=True)
class Reported:
    """Gradients, and what they are said to predict."""

    numbers: torch.Tensor
    prediction: Prediction


def test_what_is_wrong_when_it_is_computed_again_is_not_valid_and_said_to_be_so():
    batch = TargetBatch(lambda x: x.sin(), lambda z, _: z.sum(1, keepdim=True), random(3, 4), torch.zeros(3, 1).long())

    def wrong(few):
        gradient = 2 * few.x.cos().unsqueeze(1)
        return Reported(gradient, predict_slope(gradient, generator()))

    settings = CheckSettings(group_size=4)
    _, verdict = checked(
        batch,
        wrong(batch),
        lambda few, _: wrong(few),
        numbers=range(3),
        computed_by="reverse_over_reverse",
        settings=settings,
    )
    assert not verdict.explanation.valid.any()
    assert "No two computations of the derivatives" in " ".join(map(str, verdict.explanation.findings))


def test_a_sample_is_valid_where_all_its_classes_are():
    batch = TargetBatch(lambda x: x, lambda z, k: z.gather(1, k), random(3, 4), torch.tensor([[0, 1]] * 3))
    verdict, valid = unchecked(batch), torch.tensor([[True, True], [True, False], [True, True]])
    verdict = replace(verdict, explanation=replace(verdict.explanation, valid=valid))
    assert verdict.passed_on(None, ()).valid.tolist() == [True, False, True]
    assert verdict.passed_on(None, (), torch.tensor([False, True, True])).valid.tolist() == [False, False, True]


def test_coupling_is_found_where_the_forward_accepts_three_known_samples_only():
    known = random(3, 4)

    def model(x):
        assert len(x) == 3
        assert (x.unsqueeze(1) == known).all(dim=2).any(dim=1).all()
        return torch.cat([x[:1], x[1:] * x[:-1]]).sin()

    batch = TargetBatch(model, lambda z, k: z, known, torch.zeros(3, 4, dtype=torch.long))
    assert is_coupled(batch, 1, group_size=3, generator=generator())


@pytest.mark.parametrize("num_samples", [1, 3, 8, 20])
def test_all_samples_have_had_their_turn_after_so_many_measurements(num_samples):
    batch = TargetBatch(lambda x: x, lambda z, k: z, random(num_samples, 1), torch.zeros(num_samples, 1).long())
    checks, checked_samples = None, set()
    for _ in range(1 + TURNS):
        if checks is not None:
            checked_samples |= set(checks.due(range(num_samples), num_samples).tolist())
        checks = unchecked(batch).passed_on(checks, ())
    assert checked_samples == set(range(num_samples))


@pytest.mark.parametrize(("num_classes", "share"), [(1, 1.0), (2, 0.6), (10, 1 / 7)])
def test_the_share_of_a_class_in_the_direction(num_classes, share):
    """Of three vectors with one class; of its own two and a third for all with more."""
    gradient = random(2, num_classes, 5)
    norm = gradient.norm(dim=-1)
    assert predict(gradient, gradient, norm, lambda w: norm, generator()).share == pytest.approx(share)


def padded_to_the_longest(x):
    """The mean over the steps of the longest sequence in the batch; zeros are padding."""
    longest = int((x != 0).any(-1).sum(1).max())
    return x[:, :longest].sin().mean(1)


def scaled_by_one_for_all(x):
    return x.flatten(1).sin() * (1.0 if (x > 5).any() else 0.5)


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("function", [input_gradient, input_hessian, input_spectrum])
@pytest.mark.parametrize("model", [padded_to_the_longest, scaled_by_one_for_all])
def test_coupling_is_found_where_the_first_and_the_last_sample_decide_for_all(model, function, dtype):
    x = random(4, 6, 2, dtype=dtype)
    for i, length in enumerate((6, 3, 2, 6)):
        x[i, length:] = 0
    x[[0, 3], 0, 0] = 6.0
    with pytest.warns(UserWarning, match="changes with the other samples in the batch"):
        function(model, x, 0)


class EvaluatedAgain(torch.autograd.Function):
    """A solver whose values carry a small error, and whose backward evaluates the module again, in its own dtype."""

    @staticmethod
    def forward(ctx, x, module):
        ctx.save_for_backward(x)
        ctx.module = module
        return module(x) * (1 + 1e-6 * torch.sin(1e9 * x.double().sum()).to(x))

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            outputs = ctx.module(inner)
        return torch.autograd.grad(outputs, inner, grad)[0], None


@pytest.mark.parametrize("target", ["logit", "prob"])
def test_a_backward_without_a_derivative_is_found_behind_the_noise_of_a_solver(target):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2))
    model.forward = lambda x: EvaluatedAgain.apply(x, model[:])
    spectrum = quietly(input_spectrum, model, random(8, 2, dtype=torch.float32), 0, target)
    assert not spectrum.valid.any()
