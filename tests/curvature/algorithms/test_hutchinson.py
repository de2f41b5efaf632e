"""Estimators are unbiased, know their error, and are exact where nothing is left to estimate."""

import pytest
import torch
from support.spectra import EVEN, SPREAD, prescribed, run

from lightning_hessian.curvature.algorithms.hutchinson import estimate, estimate_norm
from lightning_hessian.curvature.algorithms.quadrature import Density, density

F64 = torch.float64


def estimates(operator, known, num_vectors, seed):
    return estimate(operator, known, num_vectors, generator=torch.Generator().manual_seed(seed))


def test_errors_hold_as_often_as_they_say():
    """Over 200 seeds the truth lies within two standard errors (Student's t, 29 degrees: 94.5 %) of the mean."""
    operator = prescribed(EVEN, SPREAD)
    known = run(operator, 4, tolerance=1e-6)
    truth = operator.matrices.diagonal(dim1=1, dim2=2).sum(1)
    norm = torch.linalg.matrix_norm(operator.matrices)
    inside = torch.zeros(2, 2)
    for seed in range(200):
        found = estimates(operator, known, 30, seed)
        inside[0] += (found.trace - truth).abs() <= 2 * found.trace_error
        inside[1] += (found.frobenius_norm - norm).abs() <= 2 * found.frobenius_norm_error
    share = inside / 200
    assert (share > 0.89).all()
    assert (share < 0.99).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_diagonal(seed):
    operator = prescribed(SPREAD)
    found = estimates(operator, run(operator, 10, tolerance=1e-8), 200, seed)
    truth = operator.matrices.diagonal(dim1=1, dim2=2)
    within = ((found.diagonal - truth).abs() <= 3 * found.diagonal_error).double().mean()
    assert within > 0.95
    assert found.diagonal_error.max() < 0.1


def test_exact_when_all_is_known():
    operator = prescribed([3.0, -2.0, 1.0] + [0.0] * 20)
    found = estimates(operator, run(operator, 3, which="largest_magnitude", tolerance=1e-12), 2, 0)
    assert float(found.trace[0]) == pytest.approx(2.0)
    assert float(found.trace_error[0]) < 1e-12
    assert float(found.frobenius_norm[0]) == pytest.approx(14**0.5)
    torch.testing.assert_close(found.diagonal, operator.matrices.diagonal(dim1=1, dim2=2), rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_errors_are_not_below_what_rounding_leaves(dtype):
    """With every eigenvalue known, random vectors have nothing to disagree on, and digits are lost all the same."""
    operator = prescribed([3.0, -2.0, 1.0, 0.5] + [0.0] * 56, dtype=dtype)
    matrices = operator.matrices.double()
    for seed in range(20):
        found = estimates(operator, run(operator, 10, seed), 20, seed)
        assert (found.trace - matrices.diagonal(dim1=1, dim2=2).sum(1)).abs() <= found.trace_error
        assert (found.frobenius_norm - torch.linalg.matrix_norm(matrices)).abs() <= found.frobenius_norm_error
        assert found.trace_error < 100 * torch.finfo(dtype).eps


def test_a_norm_is_exact_inside_of_what_is_known():
    operator = prescribed([30.0, -20.0] + [0.0] * 40, EVEN[:42])
    known = run(operator, 2, which="largest_magnitude").eigenvectors
    found = estimate_norm(operator.matvec, known, 20, generator=torch.Generator().manual_seed(0))
    norm, error = found.value, found.error
    truth = torch.linalg.matrix_norm(operator.matrices)
    assert (norm[0] - truth[0]).abs() < 1e-8
    assert error[0] < 1e-8 < error[1]
    assert (norm[1] - truth[1]).abs() <= 3 * error[1]


def test_quadrature_is_exact_to_degree_2m_minus_1():
    operator = prescribed(EVEN, SPREAD, [1.0] + [0.0] * 59)  # the last one exhausts its space, which draws more
    steps, num_vectors = 5, 3
    rule = density(operator, steps, num_vectors, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rule.weights.sum(-1), torch.ones(3, num_vectors, dtype=F64))
    seeds = torch.randint(2**62, (num_vectors,), generator=torch.Generator().manual_seed(0)).tolist()
    for s, seed in enumerate(seeds):
        v = torch.randn(60, generator=torch.Generator().manual_seed(seed), dtype=F64)
        v /= v.norm()
        for degree in range(2 * steps):
            power = torch.linalg.matrix_power(operator.matrices, degree)
            torch.testing.assert_close(rule.moment(degree)[:, s], v @ power @ v, rtol=1e-9, atol=1e-12)
    power = torch.linalg.matrix_power(operator.matrices, 2 * steps)
    assert not torch.allclose(rule.moment(2 * steps)[:, 2], v @ power @ v, rtol=1e-9)


def test_bands_cover_the_true_density_as_often_as_they_say():
    operator = prescribed(EVEN)
    at = torch.tensor([-0.1, 0.2, 0.5], dtype=F64)
    truth = (torch.tensor(EVEN, dtype=F64).unsqueeze(1) <= at).double().mean(0)
    bumps = torch.exp(-((torch.tensor(EVEN, dtype=F64).unsqueeze(1) - at) ** 2) / 2 / 0.01)
    smooth_truth = bumps.mean(0) / (0.1 * (2 * torch.pi) ** 0.5)
    rule = density(operator, 25, 400, generator=torch.Generator().manual_seed(0))
    covered = torch.zeros(2)
    for nodes, weights in zip(rule.nodes.split(20, dim=1), rule.weights.split(20, dim=1), strict=True):
        part = Density(nodes, weights)
        for i, (found, right) in enumerate([(part.cumulative(at), truth), (part.smoothed(at, 0.1), smooth_truth)]):
            covered[i] += ((found[0][0] - right).abs() <= 2 * found[1][0]).double().mean() / 20
    assert (covered > 0.85).all()


def test_density_of_a_rank_deficient_operator():
    rule = density(prescribed([1.0] + [0.0] * 9), 10, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rule.weights.sum(-1), torch.ones(1, 4, dtype=F64))
    torch.testing.assert_close(rule.moment(1), rule.moment(2))
