"""Central differences of values certify true derivatives and nothing else; what fails is told apart by its kind."""

import pytest
import torch
from sklearn.datasets import load_digits
from support.networks import custom_function
from torch import nn

from lightning_hessian.curvature.checks.certificate import OUTCOMES, compare
from lightning_hessian.curvature.checks.prediction import Prediction, predict
from lightning_hessian.curvature.checks.step_dependence import _is_wrong
from lightning_hessian.curvature.target_batch import TargetBatch

F64, F32 = torch.float64, torch.float32
DIGITS = torch.tensor(load_digits().images[:4], dtype=F64).unsqueeze(1) / 16


def cnn(activation=nn.GELU, pool=False, dtype=F64):
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 6, 3), activation(), *([nn.MaxPool2d(2)] if pool else []), nn.Flatten()]
    head = [nn.Linear(54 if pool else 216, 16), activation(), nn.Linear(16, 10)]
    return nn.Sequential(*layers, *head).to(dtype).requires_grad_(False)


def unit(v):
    return v / v.norm(dim=1, keepdim=True).clamp_min(1e-300)


def predicted(function, x, seed=1):
    """What autograd says of output 0 at ``x``, column by column, along a mix of top eigenvector, gradient and noise."""
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(function(x)[:, 0].sum(), x, create_graph=True)
    g = g.flatten(1)
    columns = [torch.zeros_like(g) for _ in range(g.shape[1])]
    if g.requires_grad:
        for i in range(g.shape[1]):
            (row,) = torch.autograd.grad(g[:, i].sum(), x, retain_graph=True, materialize_grads=True)
            columns[i] = row.flatten(1)
    hessian = torch.stack(columns, dim=1)
    hessian, g = ((hessian + hessian.mT) / 2).detach(), g.detach()
    values, vectors = torch.linalg.eigh(hessian)
    top = vectors.gather(2, values.abs().argmax(1)[:, None, None].expand(-1, g.shape[1], 1)).squeeze(2)
    random = torch.randn(g.shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(g)
    aligned = torch.where((top * g).sum(1, keepdim=True) < 0, -1.0, 1.0).to(g)
    w = unit(unit(top) + aligned * unit(g) + unit(random))
    return Prediction(
        direction=w,
        slope=(g * w).sum(1, keepdim=True),
        curvature=torch.einsum("nd,nde,ne->n", w, hessian, w).unsqueeze(1),
        gradient_norm=g.norm(dim=1, keepdim=True),
        spectral_norm=values.abs().amax(1, keepdim=True),
    )


def certificate(function, x, values=None, dtype=F64, group_size=16, **options):
    """That of output 0 of ``function``, by differences of ``values``, or of its own values."""
    return counted_certificate(function, x, values, dtype, group_size, **options)[0]


def counted_certificate(function, x, values=None, dtype=F64, group_size=16, **options):
    """And how many values were computed per sample."""
    num_values = 0

    def network(x):
        nonlocal num_values
        num_values += len(x)
        return (values or function)(x)

    classes = torch.zeros(len(x), 1, dtype=torch.long)
    batch = TargetBatch(network, lambda z, k: z.gather(1, k), x.to(dtype), classes)
    return compare(batch, predicted(function, x), group_size, **options), num_values / len(x)


def outcomes(found):
    return {OUTCOMES[i] for i in found.outcome.flatten().tolist()}


# Its derivative is right, and its second derivative is zero.
lying_sine = custom_function(torch.sin, lambda x: x.cos().detach())


def quadratic(x):
    return (x * x).sum(dim=1, keepdim=True)


def only_images(x):
    assert ((x >= 0) & (x <= 1)).all()
    return cnn()(x)


gelu, relu, pooled, gelu32 = cnn(), cnn(nn.ReLU), cnn(pool=True), cnn(dtype=F32)
inside = 0.3 + 0.4 * DIGITS

TRUE = {
    "smooth": (gelu, DIGITS, {}, 1e-6, 5),
    "piecewise linear under softmax": (lambda x: relu(x).softmax(1), DIGITS, {}, 1e-6, 5),
    "max-pooling of real digits": (pooled, DIGITS, {}, 1e-5, 10),
    "derivatives in float32": (gelu32, DIGITS.float(), {"values": gelu}, 1e-5, 5),
    "all in float32": (gelu32, DIGITS.float(), {"dtype": F32}, 5e-3, 15),
    "float32 inside": (lambda x: gelu32(x.float()).to(x.dtype), DIGITS, {}, 1e-2, 15),
    "a stationary point": (quadratic, torch.zeros(2, 5, dtype=F64), {}, 1e-12, 5),
    "a plateau": (lambda x: quadratic(x.relu()), -torch.ones(2, 5, dtype=F64), {}, 1e-12, 5),
    "linear": (lambda x: x[:, :1] + 2 * x[:, 1:], torch.randn(3, 2, dtype=F64), {}, 1e-9, 5),
    "inputs up to 255": (lambda x: gelu(x / 255), 255 * DIGITS, {}, 1e-6, 5),
    "tiny inputs": (lambda x: gelu(1e20 * x), 1e-20 * DIGITS, {}, 1e-6, 5),
    "large values": (lambda x: 1e8 * gelu(x), DIGITS, {}, 1e-6, 5),
    "a saturated softmax": (lambda x: (200 * gelu(x)).softmax(1), DIGITS, {}, 1e-3, 5),
    "a valid range that steps stay in": (only_images, inside, {}, 1e-6, 5),
}


@pytest.mark.parametrize("case", TRUE)
def test_true_derivatives_are_certified_by_few_values(case):
    function, x, arguments, error, most_values = TRUE[case]
    found, num_values = counted_certificate(function, x, **arguments)
    assert outcomes(found) == {"certified"}
    assert found.error.max() <= error
    assert num_values <= most_values


FALSE = {
    "a kink at the sample": (
        lambda x: quadratic(x) + x.abs().sum(1, keepdim=True),
        torch.zeros(2, 5, dtype=F64),
        "kink",
    ),
    "complex abs at zero": (
        lambda x: torch.complex(x, 0 * x).abs().pow(2).sum(1, keepdim=True),
        torch.tensor([[0.0, 1.0]], dtype=F64),
        "contradicted",
    ),
    "a second derivative left out": (
        lambda x: quadratic(lying_sine(x)),
        torch.full((2, 5), 0.7, dtype=F64),
        "contradicted",
    ),
    "a detached factor": (lambda x: gelu(x) * gelu(x).detach().softmax(1), DIGITS, "contradicted"),
    "a thousandth of the gradient left out": (
        lambda x: gelu(x) + 1e-4 * x.detach().flatten(1).sum(1, keepdim=True),
        torch.randn(4, 1, 8, 8, dtype=F64, generator=torch.Generator().manual_seed(0)),
        "contradicted",
    ),
    "samples that influence each other": (lambda x: gelu(x - 0.5 * x.mean(0)), DIGITS, "contradicted"),
    "dropout left on": (lambda x: gelu(nn.functional.dropout(x, 0.3)), DIGITS, "noise"),
    "noise of 1e-3": (lambda x: gelu(x) + 1e-3 * torch.randn(len(x), 10, dtype=F64), DIGITS, "noise"),
    "values that refuse every step": (only_images, DIGITS, "unverifiable"),
}


@pytest.mark.parametrize("case", FALSE)
def test_what_is_wrong_is_never_certified_and_named_by_its_kind(case):
    function, x, outcome = FALSE[case]
    assert outcomes(certificate(function, x)) == {outcome}


def test_one_sample_does_not_spoil_the_others():
    x = torch.tensor([[0.0, 0.0], [1.0, 2.0], [0.5, -1.0]], dtype=F64)
    found = certificate(lambda x: quadratic(x) + x.abs().sum(1, keepdim=True), x)
    assert [OUTCOMES[i] for i in found.outcome.flatten()] == ["kink", "certified", "certified"]


def test_groups_change_nothing_and_the_step_that_did_is_where_the_next_time_begins():
    whole = certificate(pooled, DIGITS)
    for size in (1, 3):
        assert torch.equal(certificate(pooled, DIGITS, group_size=size).outcome, whole.outcome)
    again, num_values = counted_certificate(pooled, DIGITS, first_step=whole.step)
    assert outcomes(again) == {"certified"}
    assert num_values == 5


@pytest.mark.parametrize("seed", range(6))
def test_the_direction_never_vanishes(seed):
    """With a single input, top eigenvector, gradient and random vector are all ±1."""
    one = torch.ones(2, 3, 1, dtype=F64)
    generator = torch.Generator().manual_seed(seed)
    found = predict(one, -one, one[..., 0], lambda w: w, generator)
    assert torch.equal(found.direction.abs(), torch.ones(2, 1, dtype=F64))


def test_an_error_that_shorter_steps_do_not_show_is_no_mistake():
    """Steps from the longest to the shortest: a long one may cross kinks, a short one shows what is there."""
    blur = torch.zeros(3, 1, 1)
    assert not _is_wrong(torch.tensor([5.0, 5.0, 0.1]).reshape(3, 1, 1), blur, torch.ones(())).any()
    assert _is_wrong(torch.tensor([0.1, 5.0, 5.0]).reshape(3, 1, 1), blur, torch.ones(())).flatten().tolist() == [
        False,
        True,
        True,
    ]


def test_noisy_values_are_compared_at_a_hundred_times_the_first_step():
    """Their noise hides a curvature of 2 at h = 0.1, and not at h = 1; at h = 10 the function is another one."""

    def noisy(x):
        return 1e5 + quadratic(x.clamp(-4, 4)) + 0.002 * (1e6 * x.detach()).sin().sum(1, keepdim=True)

    found = certificate(noisy, torch.ones(2, 5, dtype=F64))
    assert outcomes(found) == {"certified"}
    torch.testing.assert_close(found.step, torch.ones(2, dtype=F64))


def test_noise_above_that_of_float32_is_compared_at_ten_times_the_first_step_in_the_end():
    """At h = 0.01 and below, noise of 4e-6 hides a curvature of 2, and shorter steps are tried first."""
    found = certificate(
        lambda x: quadratic(x) + 2e-5 * (1e9 * x.detach()).sin().sum(1, keepdim=True), torch.ones(2, 5, dtype=F64)
    )
    assert outcomes(found) == {"certified"}
    torch.testing.assert_close(found.step, torch.full((2,), 0.1, dtype=F64))


def test_a_weak_kink_is_not_taken_for_the_noise_of_float32():
    """Its fourth difference is 1e-7 of the values at the first step, and shrinks with the step."""
    found = certificate(
        lambda x: quadratic(x) + 3e-4 * (x - 1).relu().sum(1, keepdim=True), torch.ones(2, 5, dtype=F64)
    )
    assert outcomes(found) == {"kink"}


@pytest.mark.parametrize("size", [1e-5, 1e-4])
def test_a_weak_kink_does_not_hide_a_wrong_curvature(size):
    """A curvature that is 2 off, of which the kink is less than a third at steps of 0.01 and 0.001."""
    found = certificate(
        lambda x: quadratic(x.detach()) + (2 * (x - x.detach())).sum(1, keepdim=True),
        torch.ones(2, 5, dtype=F64),
        values=lambda x: quadratic(x) + size * (x - 1).abs().sum(1, keepdim=True),
    )
    assert outcomes(found) == {"contradicted"}


@pytest.mark.parametrize("kink", [1e-5, 3e-4, 1e-3, 0.1, 10.0])
def test_a_kink_does_not_hide_a_wrong_second_derivative(kink):
    """That of |x|², which autograd takes for 0 at x = 0, where it is 2."""
    found = certificate(
        lambda x: torch.complex(x, 0 * x).abs().pow(2).sum(1, keepdim=True) + kink * x[:, :1].relu(),
        torch.tensor([[0.0, 1.0]], dtype=F64),
    )
    assert outcomes(found) == {"contradicted"}
    assert (found.slope_error < 1e-3).all()  # nor is it taken for a wrong gradient


def test_a_third_smooth_piece_is_no_contradiction_of_both_sides_of_a_kink():
    """In (u⁺ + v⁺ + 1)² at 0 with u = x₀, v = −x₀, one unit is active on either side, and none for autograd."""
    found = certificate(lambda x: (x.relu() + 1.001 * (-x).relu() + 1).square(), torch.zeros(1, 1, dtype=F64))
    assert outcomes(found) == {"kink"}


def test_values_that_change_at_random_are_not_certified_at_a_longer_step():
    generator = torch.Generator().manual_seed(0)
    found = certificate(
        lambda x: quadratic(x) + 4e-5 * torch.randn(len(x), 1, dtype=F64, generator=generator),
        torch.ones(40, 5, dtype=F64),
    )
    # By chance, the noise of a few looks as small as that of float32 at first.
    assert found.is_outcome("noise").sum() > 20


def test_a_kink_that_three_steps_show_needs_no_shorter_ones():
    found, num_values = counted_certificate(
        lambda x: quadratic(x) + 3 * (x - 1).relu().sum(1, keepdim=True), torch.ones(2, 5, dtype=F64)
    )
    assert outcomes(found) == {"kink"}
    assert num_values == 20


def test_the_shortest_step_is_a_ten_millionth_of_the_input():
    """Where values are noise, every step is tried; shorter ones would hold nothing but rounding."""
    moved = []

    def random(x):
        moved.append((x - 1).abs().amax(1) / unit(torch.ones(1, 5, dtype=F64)).amax())
        return quadratic(x) + 1e-3 * torch.randn(len(x), 1, dtype=F64)

    found = certificate(random, torch.ones(2, 5, dtype=F64))
    assert outcomes(found) == {"noise"}
    distance = torch.cat(moved)
    assert 1e-8 < distance[distance > 0].min() < 1e-6
