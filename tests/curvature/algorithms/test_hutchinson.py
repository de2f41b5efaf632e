"""Estimators are unbiased, know their error, and are exact where nothing is left to estimate."""

import pytest
import torch
from support.spectra import EVEN, SPREAD, prescribed, run

from lightning_hessian.curvature.algorithms.hutchinson import (
    estimate,
    estimate_asymmetry,
    estimate_norm,
    random_products,
)
from lightning_hessian.curvature.algorithms.krylov import KnownProducts
from lightning_hessian.curvature.algorithms.quadrature import Density, density
from lightning_hessian.curvature.operators.hessian import MatrixOperator

F64 = torch.float64


def draw(operator, known, num_vectors, seed):
    return random_products(operator, known, num_vectors, generator=torch.Generator().manual_seed(seed))


def estimates(operator, pairs, num_vectors, seed):
    return estimate(pairs.known, draw(operator, pairs.known, num_vectors, seed))


def nothing_known(operator):
    nothing = operator.matrices[:, :0]
    return KnownProducts(nothing, nothing)


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
    q = run(operator, 2, which="largest_magnitude").eigenvectors
    known = KnownProducts(q, q @ operator.matrices)
    found = estimate_norm(known, draw(operator, known, 20, 0).products)
    norm, error = found.value, found.error
    truth = torch.linalg.matrix_norm(operator.matrices)
    assert (norm[0] - truth[0]).abs() < 1e-8
    assert error[0] < 1e-8 < error[1]
    assert (norm[1] - truth[1]).abs() <= 3 * error[1]


def test_estimates_do_not_need_converged_pairs():
    """Outside of a Krylov space whose pairs are far from converged, the mean over many vectors is still the truth."""
    operator = prescribed(SPREAD, EVEN)
    pairs = run(operator, 4, max_matvecs=8)
    assert not pairs.converged.any()
    found = estimates(operator, pairs, 20_000, 0)
    diagonal = operator.matrices.diagonal(dim1=1, dim2=2)
    assert ((found.trace - diagonal.sum(1)).abs() <= 3 * found.trace_error).all()
    assert ((found.frobenius_norm - torch.linalg.matrix_norm(operator.matrices)).abs() < 1e-2).all()
    assert ((found.diagonal - diagonal).abs() <= 3 * found.diagonal_error).double().mean() > 0.98


@pytest.mark.parametrize("num_known", [0, 12])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_asymmetry_needs_no_symmetric_matrix_and_no_product(num_known, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(2, 200, 200, generator=generator, dtype=F64)
    operator = MatrixOperator(matrices + matrices.mT + 0.3 * torch.randn(2, 200, 200, generator=generator, dtype=F64))
    exact = torch.linalg.matrix_norm(operator.matrices - operator.matrices.mT)
    known = run(operator, 2, max_matvecs=num_known).known if num_known else nothing_known(operator)
    random = draw(operator, known, 10, seed)
    forms = torch.einsum("id,pde,je->pji", random.signs, operator.matrices, random.signs)  # z_iᵀ A z_j
    pairs = torch.triu_indices(10, 10, offset=1)
    expected = (forms - forms.mT)[:, pairs[0], pairs[1]].square().mean(1).sqrt()
    found = estimate_asymmetry(known, random)
    torch.testing.assert_close(found, expected)
    assert ((found / exact > 0.6) & (found / exact < 1.5)).all()


def test_a_symmetric_matrix_has_no_asymmetry():
    operator = MatrixOperator(torch.eye(5).expand(2, 5, 5))
    known = nothing_known(operator)
    assert not estimate_asymmetry(known, draw(operator, known, 4, 0)).any()


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
