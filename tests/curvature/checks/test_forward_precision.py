"""Forwards that compute in a coarser precision than their inputs have: that is noise, and hides no large mistake."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from support.warned import told
from torch import nn

from lightning_hessian import input_gradient, input_spectrum
from lightning_hessian.curvature.checks.cause_search import CauseSearch
from lightning_hessian.curvature.checks.certificate import OUTCOMES, certify
from lightning_hessian.curvature.checks.forward_precision import coarsest_dtype
from lightning_hessian.curvature.checks.second_look import predicted_along
from lightning_hessian.curvature.target_batch import TargetBatch

F64, F32 = torch.float64, torch.float32


def random(*shape, dtype=F64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def half(x, dtype, cut=False):
    first, second = random(6, 16), random(16, 3, seed=1)
    h = F.gelu(x.to(dtype) @ first.to(dtype))
    return ((h.detach() * h if cut else h) @ second.to(dtype)).to(x.dtype)


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("half_dtype", [torch.float16, torch.bfloat16])
def test_a_forward_in_half_precision_is_judged_by_that_precision(dtype, half_dtype):
    x = random(2, 6, dtype=dtype, seed=2)
    spectrum, message = told(input_spectrum, lambda x: half(x, half_dtype), x, 0)
    assert message == ""
    assert f"computes partly in {str(half_dtype)[6:]}" in spectrum.diagnosis.message


@pytest.mark.parametrize("dtype", [F64, F32])
def test_a_wrong_gradient_in_half_precision_is_found_where_that_is_precise_enough(dtype):
    x = random(2, 6, dtype=dtype, seed=2)
    _, message = told(input_gradient, lambda x: half(x, torch.float16, cut=True), x, 0)
    assert "contradict the gradient" in message


def energies(seed, offset, then=lambda y: y, cut=False):
    """Curved by about 1 around inputs of six entries, computed in float32 on top of a large number."""
    first, second = random(6, 8, seed=seed), random(8, seed=seed + 1000).float()

    def forward(x):
        h = x @ first.to(x)
        more = 0.1 * h * h.detach() if cut else 0.0
        return then(((h.sin() + more).float() @ second + offset).to(x.dtype))

    return forward


REASSEMBLED = {
    "as it is": lambda y: y,
    "in other units": lambda y: 1.7 * y,
    "in a sum": lambda y: 1.3 * y + 0.2 * y.cos(),
}


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("name", REASSEMBLED)
def test_rounding_to_float32_beside_a_large_number_is_no_mistake(name, dtype):
    for seed in range(8):
        x = random(3, 6, dtype=dtype, seed=seed + 2000)
        spectrum, message = told(input_spectrum, energies(seed, 30.0, REASSEMBLED[name]), x, 0)
        assert message == ""
        assert spectrum.valid.all()
        assert (spectrum.finite_difference_error.nan_to_num(0) < 1e-2).all()


@pytest.mark.parametrize("target", ["prob", "log_prob"])
def test_rounding_to_float32_in_a_piecewise_linear_network_is_no_mistake(target):
    for seed in range(8):
        hidden, last = random(6, 32, seed=seed), random(32, 5, seed=seed + 1000).float() / 5
        x = random(3, 6, seed=seed + 2000)
        network = partial(lambda hidden, last, x: ((x @ hidden).relu().float() @ last + 30).double(), hidden, last)
        spectrum, message = told(input_spectrum, network, x, 0, target)
        assert message == ""
        assert spectrum.valid.all()


def test_a_wrong_gradient_beside_a_large_number_is_still_found():
    found = 0
    for seed in range(8):
        x = random(3, 6, seed=seed + 2000)
        spectrum, message = told(input_spectrum, energies(seed, 30.0, cut=True), x, 0)
        assert "contradict the gradient" in message
        found += int((~spectrum.valid).sum())
    assert found >= 22  # of 24


def test_a_kink_beside_a_large_number_is_no_mistake():
    for seed in range(8):
        x = random(3, 6, seed=seed + 2000)
        x[0, 0] = x[0, 1]
        smooth = energies(seed, 30.0)
        spectrum, message = told(input_spectrum, lambda x: smooth(x) + x[:, :2].amax(1), x, 0)  # noqa: B023
        assert message == ""
        assert spectrum.valid.all()


def test_only_results_that_depend_on_the_input_count():
    batch = TargetBatch(lambda x: x * torch.ones(3), lambda z, k: z, random(2, 3), torch.zeros(2, 1).long())
    assert coarsest_dtype(batch) == F64
    assert coarsest_dtype(replace(batch, network=lambda x: x.float().to(x.dtype))) == F32
    assert coarsest_dtype(replace(batch, network=lambda x: torch.fft.fft(x.float()).abs().double())) == F32


def test_a_difference_of_large_numbers_shows_their_rounding():
    def difference(x):
        return torch.stack([energies(0, 1000.0)(x), energies(1, 1000.0)(x)], dim=1).log_softmax(dim=1)

    for seed in range(8):
        spectrum, message = told(input_spectrum, difference, random(3, 6, seed=seed + 2000), 0)
        assert message == ""
        assert spectrum.valid.all()


def test_what_rounding_hides_is_not_computed_again():
    classes = torch.zeros(2, 1, dtype=torch.long)
    batch = TargetBatch(lambda x: x.sin().sum(1, keepdim=True), lambda z, k: z, random(2, 3), classes)
    predicted = predicted_along(batch, random(2, 3, seed=1), slope_only=False)
    certificate = certify(batch, predicted, group_size=2)
    certificate.outcome.fill_(OUTCOMES.index("noise"))
    search = CauseSearch(batch, predicted, certificate, 2, range(2), torch.Generator().manual_seed(0))
    search.look_in_company()
    assert not search.again.any()


def test_a_gradient_that_is_off_by_more_than_a_hundredth_is_found_at_any_noise():
    def model(x):
        y = x.float().square().sum(1, keepdim=True)
        return (0.97 * y + 0.03 * y.detach() + 100).to(x.dtype)

    for seed in range(10):
        assert told(input_gradient, model, random(4, 4, seed=seed), 0)[1]


class Shifted(nn.Module):
    """A network in which large numbers cancel: as a float32 module its outputs are rounded to 1e-3."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh())
        self.head, self.offset = nn.Linear(256, 3), nn.Parameter(torch.full((256,), 1e4))

    def forward(self, x):
        weight = self.head.weight
        return F.linear(self.body(x) + self.offset, weight) - weight @ self.offset


class CancelledOutputs(nn.Module):
    """Zero up to rounding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x).softmax(1).sum(1, keepdim=True) - 1


@pytest.mark.parametrize("model", [Shifted, CancelledOutputs])
@pytest.mark.parametrize("function", [input_gradient, input_spectrum])
def test_rounding_is_not_called_a_coupling(model, function):
    _, message = told(function, model(), random(6, 16, dtype=F32), 0)
    assert "in the batch" not in message


def beside_a_large_number(x):
    return (x.sin().float().sum(1) + 100).double()


def test_float32_inside_a_script_is_seen():
    scripted = torch.jit.script(beside_a_large_number)
    for seed in range(8):
        spectrum, message = told(input_spectrum, scripted, random(3, 6, seed=seed), 0)
        assert message == ""
        assert spectrum.valid.all()


@pytest.mark.parametrize("half_dtype", [torch.float16, torch.bfloat16])
def test_a_statistic_in_half_precision_on_the_side_excuses_nothing(half_dtype):
    def model(x):
        x.to(half_dtype).mean()  # for a log
        y = x.sin().sum(1, keepdim=True)
        return 0 * y + y.detach()

    _, message = told(input_spectrum, model, random(2, 3), 0)
    assert "contradict the gradient" in message
