"""Lanczos on prescribed spectra, its identities, and everything that breaks a careless one."""

import pytest
import torch
from support.spectra import EVEN, SPREAD, prescribed, run

from lightning_hessian.curvature.algorithms.krylov import KrylovBasis
from lightning_hessian.curvature.operators.hessian import MatrixOperator

F64 = torch.float64


def expected_of(values, which, count):
    ordered = sorted(values, reverse=True)
    high = {"both_ends": (count + 1) // 2, "largest_algebraic": count, "smallest_algebraic": 0}.get(which)
    if high is None:
        return sorted(sorted(values, key=abs)[-count:], reverse=True)
    return ordered[:high] + (ordered[high - count :] if count > high else [])


CLUSTER = [5.0, 5.0 + 1e-5, 5.0 - 1e-5] + [i / 57 for i in range(57)]


@pytest.mark.parametrize("which", ["both_ends", "largest_algebraic", "smallest_algebraic", "largest_magnitude"])
@pytest.mark.parametrize("max_basis", [None, 17])
def test_every_end_of_a_prescribed_spectrum(which, max_basis):
    operator = prescribed(SPREAD, EVEN, CLUSTER)
    pairs = run(operator, 6, which=which, tolerance=1e-9, max_basis=max_basis, max_matvecs=3000)
    assert pairs.converged.all()
    for p, values in enumerate((SPREAD, EVEN, CLUSTER)):
        expected = torch.tensor(expected_of(values, which, 6), dtype=F64)
        torch.testing.assert_close(pairs.eigenvalues[p], expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("max_basis", [None, 17])
def test_residuals_are_those_of_the_vectors(max_basis):
    operator = prescribed(SPREAD, EVEN)
    pairs = run(operator, 5, tolerance=1e-4, max_basis=max_basis)
    vectors = pairs.eigenvectors
    actual = (operator.matrices @ vectors.mT).mT - pairs.eigenvalues.unsqueeze(-1) * vectors
    torch.testing.assert_close(actual.norm(dim=-1), pairs.residuals, rtol=1e-6, atol=1e-12)
    gram = vectors @ vectors.mT
    torch.testing.assert_close(gram, torch.eye(5, dtype=F64).expand_as(gram), rtol=0, atol=1e-12)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("restarts", [0, 3])
def test_the_lanczos_relation(block_size, restarts):
    operator = prescribed(SPREAD, EVEN)
    basis = KrylovBasis(operator, block_size, 20, torch.Generator().manual_seed(0))
    for _ in range(restarts):
        while not basis.full:
            basis.grow()
        basis.restart("both_ends", 4)
    for _ in range(5):
        basis.grow()
    j, n = basis.num_processed, basis.num_vectors
    q, h = basis._vectors[:, :n], basis._coefficients[:, :n, :j]
    torch.testing.assert_close(operator.matrices @ q[:, :j].mT, q.mT @ h, rtol=0, atol=1e-12)
    torch.testing.assert_close(q @ q.mT, torch.eye(n, dtype=F64).expand(2, -1, -1), rtol=0, atol=1e-12)


def test_multiplicity_is_found_by_a_block():
    values = [4.0, 4.0, 4.0, *EVEN[:40]]
    found = run(prescribed(values), 4, which="largest_algebraic", tolerance=1e-8, block_size=3).eigenvalues[0]
    assert found[:3].tolist() == pytest.approx([4.0, 4.0, 4.0])
    assert found[3] == pytest.approx(max(EVEN[:40]))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_rank_deficient_at_every_scale(dtype, scale):
    values = [3.0, -2.0, 1.0] + [0.0] * 37
    pairs = run(prescribed([scale * v for v in values], dtype=dtype), 5, which="largest_magnitude")
    assert pairs.converged.all()
    expected = torch.tensor([3.0, 1.0, 0.0, 0.0, -2.0], dtype=F64)
    error = (pairs.eigenvalues[0].double() / scale - expected).abs().max()
    assert error < 1000 * torch.finfo(dtype).eps


def test_the_zero_operator():
    pairs = run(MatrixOperator(torch.zeros(2, 9, 9)), 3)
    assert not pairs.eigenvalues.any()
    assert pairs.converged.all()
    assert not pairs.residuals.any()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_fewer_dimensions_than_asked_for(size, block_size):
    values = [float(i) - 1 for i in range(size)]
    pairs = run(prescribed(values), 10, block_size=block_size)
    assert pairs.eigenvalues.shape == (1, size)
    assert pairs.eigenvalues[0].tolist() == pytest.approx(sorted(values, reverse=True), abs=1e-12)
    assert pairs.converged.all()


def test_what_does_not_converge_says_so():
    pairs = run(prescribed(EVEN), 4, tolerance=1e-12, max_matvecs=12)
    assert not pairs.converged.any()
    assert (pairs.residuals > 1e-6).all()
    assert pairs.num_matvecs == 12


class Counting(MatrixOperator):
    """Notes how many matrices each product is with."""

    def __init__(self, matrices, sizes=None):
        super().__init__(matrices)
        self.sizes = [] if sizes is None else sizes

    def matvec(self, v):
        self.sizes.append(len(v))
        return super().matvec(v)

    def select(self, index):
        return Counting(self.matrices[index], self.sizes)


EASY = [100.0, -50.0] + [0.0] * 58


@pytest.mark.parametrize("max_basis", [None, 17])
def test_converged_problems_leave_the_batch_but_none_stays_alone(max_basis):
    operator = Counting(prescribed(EASY, EVEN, EASY, EASY).matrices)
    pairs = run(operator, 2, tolerance=1e-8, max_basis=max_basis, max_matvecs=3000)
    assert pairs.converged.all()
    assert operator.sizes[0] == 4
    assert operator.sizes[-1] == 2
    for p, values in enumerate((EASY, EVEN, EASY, EASY)):
        assert pairs.eigenvalues[p].tolist() == pytest.approx([max(values), min(values)], abs=1e-7)


@pytest.mark.parametrize("max_basis", [None, 17])
def test_what_is_known_are_orthonormal_vectors_and_their_products(max_basis):
    """Also of operators that left earlier than others, whose rows are filled up with zeros."""
    operator = prescribed(EASY, EASY, EVEN, SPREAD)
    pairs = run(operator, 2, tolerance=1e-8, max_basis=max_basis, max_matvecs=3000)
    known = pairs.known
    torch.testing.assert_close(known.vectors @ operator.matrices, known.products, rtol=0, atol=1e-11)
    gram = known.vectors @ known.vectors.mT
    ones = (known.vectors != 0).any(dim=2).double()
    torch.testing.assert_close(gram, torch.diag_embed(ones), rtol=0, atol=1e-12)
    assert ones[0].sum() < ones[2].sum()
    inside = known.outside(pairs.eigenvectors)
    assert inside.norm(dim=2).max() < 1e-12
    torch.testing.assert_close(
        known.apply(pairs.eigenvectors), pairs.eigenvectors @ operator.matrices, rtol=0, atol=1e-10
    )


@pytest.mark.parametrize(
    ("values", "relative", "most"),
    [(SPREAD, 0.0, 18), (SPREAD, 3e-4, 16), (EVEN, 0.0, 38), (EVEN, 3e-4, 34), (EASY, 0.0, 8)],
)
def test_no_more_products_than_needed(values, relative, most):
    pairs = run(prescribed(values), 4, relative_tolerance=relative)
    assert pairs.converged.all()
    assert pairs.num_matvecs <= most


def test_a_residual_may_be_small_against_the_eigenvalue_or_against_the_largest():
    operator = prescribed(EVEN)
    strict, loose = (run(operator, 6, tolerance=1e-9, relative_tolerance=r) for r in (0.0, 1e-2))
    assert loose.converged.all()
    assert (loose.residuals <= 1e-2 * loose.eigenvalues.abs()).all()
    assert (loose.residuals > 1e-9).any()
    assert loose.num_matvecs < strict.num_matvecs
    assert ((loose.eigenvalues - strict.eigenvalues).abs() <= loose.residuals).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_products_that_are_not_finite_spoil_their_own_problem_only(bad):
    operator = prescribed(SPREAD, EVEN, SPREAD)
    matrices = operator.matrices.clone()
    matrices[1, 3, 5] = bad
    found, expected = run(MatrixOperator(matrices), 4), run(MatrixOperator(operator.matrices[[0, 2]]), 4)
    assert not found.converged[1].any()
    for name in ("eigenvalues", "eigenvectors", "residuals"):
        assert getattr(found, name)[1].isnan().all()
        torch.testing.assert_close(getattr(found, name)[[0, 2]], getattr(expected, name))
    assert found.known.products[1].isnan().all()
    assert found.converged[[0, 2]].all()


def test_the_spectrum_of_minus_a_is_minus_the_spectrum():
    operator = prescribed(SPREAD, EVEN)
    up = run(operator, 4, tolerance=1e-9)
    down = run(MatrixOperator(-operator.matrices), 4, tolerance=1e-9)
    torch.testing.assert_close(down.eigenvalues, -up.eigenvalues.flip(1), rtol=0, atol=1e-9)


def test_too_small_a_basis_raises():
    with pytest.raises(ValueError, match="max_basis=5 is too small for 4 eigenpairs: it must be at least 7"):
        run(prescribed(EVEN), 4, max_basis=5)
