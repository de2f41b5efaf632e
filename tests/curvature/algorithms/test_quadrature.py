"""The density of a spectrum: exact where the spectrum is complete, within its error where it is estimated."""

import pytest
import torch
from support.networks import mlp
from torch import nn

from lightning_hessian import ConfigurationError, input_spectrum
from lightning_hessian.curvature.algorithms.quadrature import exact_density, without_rounding

F64 = torch.float64


def test_a_complete_spectrum_counts_its_zeros_and_has_no_error():
    rule = exact_density(torch.tensor([[[2.0, 1.0, -1.0]]], dtype=F64), 6)
    assert rule.nodes.tolist() == [[[[-1.0, 0.0, 1.0, 2.0]]]]
    share, error = rule.cumulative(torch.tensor([-1.5, -1.0, -0.5, 0.0, 1.5, 2.0], dtype=F64))
    torch.testing.assert_close(share[0, 0] * 6, torch.tensor([0, 1, 1, 4, 5, 6], dtype=F64))
    assert not error.any()
    torch.testing.assert_close(rule.moment(2)[0, 0, 0] * 6, torch.tensor(6.0, dtype=F64))
    smooth, error = rule.smoothed(torch.zeros(1, dtype=F64), 0.01)
    torch.testing.assert_close(smooth[0, 0, 0], torch.tensor(0.5 / (0.01 * (2 * torch.pi) ** 0.5), dtype=F64))
    assert not error.any()
    assert exact_density(torch.tensor([1.0, 0.0]), 2).nodes.tolist() == [[0.0, 1.0]]


def test_what_rounding_may_have_made_is_zero_and_what_is_larger_is_not():
    """With D = 10,000, up to 10 · 2e-16 · 100."""
    eigenvalues = torch.tensor([2.0, 3e-12, 3e-13, -3e-13, -3e-12, torch.nan], dtype=F64)
    found = without_rounding(eigenvalues[:-1], 10_000)
    assert found.tolist() == [2.0, 3e-12, 0.0, 0.0, -3e-12]
    assert without_rounding(eigenvalues, 10_000).isnan()[-1]


@pytest.mark.parametrize(("activation", "target"), [(nn.Tanh, "logit"), (nn.ReLU, "prob"), (nn.ReLU, "logit")])
def test_every_complete_spectrum_has_its_density(activation, target):
    net, x = mlp(activation), torch.randn(3, 6, dtype=F64)
    spectrum = input_spectrum(net, x, [0, 2], target, num_eigenvalues=2)
    assert spectrum.complete
    assert spectrum.density.nodes.shape[:3] == (3, 2, 1)
    torch.testing.assert_close(spectrum.density.weights.sum(-1), torch.ones(3, 2, 1, dtype=F64))
    torch.testing.assert_close(6 * spectrum.density.moment(1)[..., 0], spectrum.trace)
    torch.testing.assert_close((6 * spectrum.density.moment(2)[..., 0]).sqrt(), spectrum.frobenius_norm)


@pytest.mark.parametrize(("activation", "target"), [(nn.Tanh, "prob"), (nn.ReLU, "log_prob")])
@pytest.mark.parametrize("memory", [None, 2_000_000])
def test_lanczos_estimates_it(activation, target, memory):
    net, x = mlp(activation, inputs=100, width=30), torch.randn(4, 100, dtype=F64)
    arguments = {"target": target, "method": "lanczos", "num_eigenvalues": 4}
    plain = input_spectrum(net, x, [0, 2], **arguments)
    found = input_spectrum(net, x, [0, 2], **arguments, density_vectors=24, max_memory=memory)
    assert plain.density is None
    assert found.density.nodes.shape == found.density.weights.shape == (4, 2, 24, 40)
    assert found.cost.num_matvecs == plain.cost.num_matvecs + 24 * 40
    assert torch.equal(found.trace, plain.trace) or memory
    exact = input_spectrum(net, x, [0, 2], target, method="dense").density
    scale = float(exact.nodes.abs().max())
    at = scale * torch.tensor([-0.3, -0.1, 0.1, 0.3], dtype=F64)
    for wanted in (lambda rule: rule.cumulative(at), lambda rule: rule.smoothed(at, scale / 4)):
        (value, error), (truth, _) = wanted(found.density), wanted(exact)
        assert value.shape == error.shape == (4, 2, 4)
        assert ((value - truth).abs() <= 4 * error + 1e-9).all()
    for degree in (1, 2):
        moments = found.density.moment(degree)
        slack = 4 * moments.std(dim=-1) / 24**0.5
        assert ((moments.mean(-1) - exact.moment(degree)[..., 0]).abs() <= slack).all()


def test_groups_and_broken_down_krylov_spaces_start_from_the_same_vectors():
    """Problem by problem the rule is that of all at once, though the spaces of a rank-2 Hessian are exhausted."""
    net, x = mlp(nn.ReLU, inputs=80, width=30), torch.randn(3, 80, dtype=F64)
    arguments = {"target": "prob", "method": "lanczos", "num_eigenvalues": 2, "density_vectors": 3}
    together = input_spectrum(net, x, [0, 1], **arguments).density
    for n in range(3):
        alone = input_spectrum(net, x[n : n + 1], [0, 1], **arguments).density
        for degree in (1, 2, 3):
            torch.testing.assert_close(alone.moment(degree)[0], together.moment(degree)[n], rtol=1e-8, atol=1e-14)


def test_lanczos_that_finds_all_eigenvalues_needs_no_vectors():
    net, x = mlp(nn.Tanh), torch.randn(2, 6, dtype=F64)
    all_found = input_spectrum(net, x, 0, method="lanczos", num_eigenvalues=6, density_vectors=4)
    assert all_found.density.nodes.shape == (2, 1, 1, 6)


@pytest.mark.parametrize("density_vectors", [1, -2, 2.5, True])
def test_a_number_of_vectors_without_a_standard_error_raises(density_vectors):
    with pytest.raises(ConfigurationError, match=r"density_vectors=.* must be 0 .* at least 2"):
        input_spectrum(mlp(), torch.zeros(1, 6, dtype=F64), 0, density_vectors=density_vectors)
