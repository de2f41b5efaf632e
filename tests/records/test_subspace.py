"""How far top eigenvectors turn: closed forms on constructed matrices, degenerate ones above all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp

from lightning_hessian.curvature.options import Options
from lightning_hessian.records.subspace import CLEAR_GAP, _top_vectors, subspace_overlap
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers.scalars import scalars

BASIS = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))[0].T  # eight directions


def turned(i, j, angle):
    """The basis with directions i and j turned into each other."""
    basis = BASIS.copy()
    basis[i], basis[j] = (
        np.cos(angle) * BASIS[i] + np.sin(angle) * BASIS[j],
        np.cos(angle) * BASIS[j] - np.sin(angle) * BASIS[i],
    )
    return basis


def top(values, basis=BASIS, num_vectors=4, *, listed=None, residual=0.0, num_open=0, target="prob", classes=0):
    """A record of Σ λ_i u_i u_iᵀ.

    ``listed``: only so many eigenvalues, half from each end; ``num_open``: the first so many have not converged.
    """
    values = np.array([*values, *[0.0] * (8 - len(values))], dtype=float)
    order = values.argsort()[::-1]
    if listed is not None:
        order = np.concatenate([order[: (listed + 1) // 2], order[8 - listed // 2 :]])
    eigenvalues = values[order]
    index = np.abs(eigenvalues).argsort()[::-1][:num_vectors]
    return SimpleNamespace(
        target=target,
        classes=np.array([[classes]]),
        eigenvalues=eigenvalues[None, None],
        residuals=np.full((1, 1, len(eigenvalues)), residual),
        converged=np.arange(len(eigenvalues))[None, None] >= num_open,
        vector_index=index[None, None],
        eigenvectors=basis[order][index][None, None],
        complete=listed is None,
    )


def between(before, after):
    found = subspace_overlap(before, after)
    return float(found.cosine[0, 0]), float(found.overlap[0, 0])


@pytest.mark.parametrize("angle", [0.0, 0.4, np.pi / 2, np.pi])
def test_an_isolated_vector_that_turns(angle):
    expected = (abs(np.cos(angle)), np.cos(angle) ** 2)
    assert between(top([5, 1]), top([5, 1], turned(0, 4, angle))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("second", [3.0, 3.0 - 1e-9, 2.95])
@pytest.mark.parametrize("angle", [0.3, np.pi / 2])
def test_turning_inside_a_degenerate_pair_does_not_count(second, angle):
    raw = abs(BASIS[0] @ turned(0, 1, angle)[0])
    assert raw < 0.96
    assert between(top([3, second, 1]), top([3, second, 1], turned(0, 1, angle))) == pytest.approx((1, 1))


def test_two_that_swap_do_not_count():
    assert between(top([5, -4.99, 1]), top([5, -5.01, 1])) == pytest.approx((1, 1))


def test_a_pair_that_separates_does_not_count():
    """Before, any unit vector in their span was a top eigenvector: the one that stays on top was among them."""
    assert between(top([3, 3, 1]), top([2, 3, 1]))[0] == pytest.approx(1)
    assert between(top([3, 3, 1]), top([2, 3, 1]))[1] == pytest.approx(1)
    assert between(top([3, 3, 1]), top([0.5, 0.5, 3]))[0] == pytest.approx(0)


def test_half_of_a_degenerate_pair_goes():
    cosine, overlap = between(top([3, 3, 1]), top([3, 1, 3]))
    assert (cosine, overlap) == pytest.approx((0.5**0.5, 0.5))


def test_the_overlap_is_cut_where_both_gaps_are_wide():
    """After two of three leading directions have swapped nothing has turned; a turn out of the space has."""
    assert between(top([5, 4, 3, 0.1]), top([4, 5, 3, 0.1])) == pytest.approx((0, 1))
    left = turned(2, 5, 0.7)
    assert between(top([5, 4, 3.5, 0.1]), top([5, 4, 3.5, 0.1], left))[1] == pytest.approx((2 + np.cos(0.7) ** 2) / 3)


def test_signs_do_not_matter():
    assert between(top([5, 4, 1]), top([5, 4, 1], -BASIS)) == pytest.approx((1, 1))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, top([5, 1])),
        (top([]), top([5, 1])),
        (top([5, 1]), top([])),
        (top([5, 1]), top([5, 1], classes=1)),
        (top([5, 1]), top([5, 1], target="logit")),
        (top([5, 1]), top([5, 1], num_vectors=3)),
        (top([1] * 8), top([1] * 8)),  # four vectors of a group of eight
        (top([3, 2.99, 2], num_vectors=1), top([3, 2.99, 2], num_vectors=1)),  # half of a pair
        (top([9, 8.9, 8, 7, 6, 2, 1, 0.5], listed=4), top([9, 5, 4, 3, 2, 1, 0.5, 0.2], listed=4)),  # 8.9 may be two
        (top([5, 1], num_open=1), top([5, 1])),
        (top([3, 2.5], residual=0.3), top([3, 2.5], residual=0.3, num_vectors=1)),
    ],
)
def test_what_is_not_defined_is_nan(before, after):
    assert np.isnan(between(before, after)).all()


def test_the_known_end_of_an_incomplete_spectrum_is_compared():
    before = top([9, 7, 6, 5, 4, 2, 1, -0.5], listed=4)
    after = top([9, 7, 6, 5, 4, 2, 1, -0.5], turned(0, 5, 0.3), listed=4)
    assert between(before, after) == pytest.approx((np.cos(0.3), np.cos(0.3) ** 2))


def test_residuals_that_reach_over_a_gap_close_it():
    sharp, blurred = (top([3, 2, 0.1], turned(0, 1, np.pi / 2), residual=r) for r in (0.0, 0.5))
    assert between(top([3, 2, 0.1]), sharp)[0] == pytest.approx(0, abs=1e-12)
    assert between(top([3, 2, 0.1]), blurred)[0] == pytest.approx(1)


def test_all_directions_together_say_nothing():
    matrices = (np.diag([3.0, 2.5]), np.diag([2.5, 3.0]))
    old, new = (
        SimpleNamespace(
            target="prob",
            classes=np.zeros((1, 1)),
            eigenvalues=np.array([[[3.0, 2.5]]]),
            residuals=np.zeros((1, 1, 2)),
            converged=np.ones((1, 1, 2), dtype=bool),
            vector_index=np.array([[[0, 1]]]),
            eigenvectors=np.linalg.eigh(m)[1].T[::-1][None, None],
            complete=True,
        )
        for m in matrices
    )
    assert between(old, new) == pytest.approx((0, 0))


def test_a_record_without_eigenvectors_raises():
    without = SimpleNamespace(step=3, eigenvectors=None, vector_index=None)
    for previous, record in ((None, without), (without, top([5, 1]))):
        with pytest.raises(ValueError, match="step 3 holds no eigenvectors"):
            subspace_overlap(previous, record)


def measured(monitor, net, samples):
    return monitor.measure(net, samples, step=0, logged_step=0, epoch=0)


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_the_monitor_compares_with_its_last_measurement(method):
    net, samples = mlp(torch.nn.Tanh, inputs=20), Samples(torch.randn(3, 20), None)
    monitor = Measurer([0, 2], "prob", "float64", Options(method, 8), heatmap_samples=0)
    first, still = measured(monitor, net, samples), measured(monitor, net, samples)
    assert np.isnan([first.top_eigenvector_cosine, first.top_subspace_overlap]).all()
    assert not any("top_eigenvector" in tag or "top_subspace" in tag for tag in scalars(first))
    assert first.top_eigenvector_cosine.shape == (3, 2)
    np.testing.assert_allclose([still.top_eigenvector_cosine, still.top_subspace_overlap], 1, rtol=1e-6)
    with torch.no_grad():
        net[0].weight.add_(0.3 * torch.randn(8, 20))
    moved = measured(monitor, net, samples)
    tops = [r.eigenvectors[:, :, 0] for r in (still, moved)]
    isolated = np.minimum(*(_top_vectors(r)[1][..., 0] for r in (still, moved))) > CLEAR_GAP
    assert isolated.sum() >= 3
    np.testing.assert_allclose(
        moved.top_eigenvector_cosine[isolated], np.abs((tops[0] * tops[1]).sum(-1))[isolated], rtol=1e-9
    )
    assert (moved.top_subspace_overlap < 0.999).all()
    finite = moved.top_subspace_overlap[:, 1]
    assert scalars(moved)["hessian_top_subspace_overlap/prob_class_2"] == pytest.approx(
        finite[np.isfinite(finite)].mean()
    )


def test_another_predicted_class_is_not_compared():
    net, samples = mlp(torch.nn.Tanh), Samples(torch.randn(2, 6), None)
    monitor = Measurer("predicted", "prob", "float64", Options(), heatmap_samples=0)
    first = measured(monitor, net, samples)
    with torch.no_grad():
        k = first.predicted[0]
        net[-1].bias[(k + 1) % 3] += 20
    second = measured(monitor, net, samples)
    assert np.isnan(second.top_eigenvector_cosine[second.classes != first.classes]).all()
    assert second.classes[0] != first.classes[0]
