"""Column blocks: the search for autodiff mode and size, out-of-memory, symmetry."""

import weakref
from collections import Counter

import pytest
import torch
from support.networks import measure, mlp

from lightning_hessian.curvature.cost_model import ModelCosts, dense_bytes, result_bytes
from lightning_hessian.curvature.methods import dense
from lightning_hessian.curvature.methods.columns import BlockSearch, hessians
from lightning_hessian.curvature.methods.dense import symmetrize_
from lightning_hessian.curvature.operators.autodiff import ForwardOverReverse, ReverseOverReverse
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch

F64 = torch.float64
FORWARD, REVERSE = AUTODIFF_MODES = ("forward_over_reverse", "reverse_over_reverse")


def choices(block, speeds, num_blocks):
    """What a search tries, when a block of a mode runs at ``speeds[mode](size)`` columns per second."""
    tried = []
    for _ in range(num_blocks):
        tried.append((block.mode, block.size))
        block.report(block.size, block.size / speeds[block.mode](block.size))
    return tried


def best_at(size, speed):
    return lambda m: speed / (1 + abs(m - size))


def test_the_fastest_mode_and_size_win():
    block = BlockSearch(AUTODIFF_MODES, first=4, limit=100)
    tried = choices(block, {FORWARD: best_at(8, 90), REVERSE: best_at(16, 100)}, 9)
    assert tried == [
        *[(FORWARD, 4), (REVERSE, 4)],  # 90/5 and 100/13 columns per second: below half
        *[(FORWARD, 8), (FORWARD, 16)],  # fewer than at 8
        *((FORWARD, 8),) * 5,
    ]
    block = BlockSearch(AUTODIFF_MODES, first=8, limit=100)
    tried = choices(block, {FORWARD: best_at(16, 90), REVERSE: best_at(16, 100)}, 8)
    assert tried == [*((mode, m) for m in (8, 16, 32) for mode in AUTODIFF_MODES), *((REVERSE, 16),) * 2]


def test_the_limit_bounds_the_search_and_a_given_size_stays():
    growing = {name: lambda m: float(m) for name in AUTODIFF_MODES}
    assert choices(BlockSearch([FORWARD], first=4, limit=10), growing, 5) == [(FORWARD, m) for m in (4, 8, 10, 10, 10)]
    assert {size for _, size in choices(BlockSearch(AUTODIFF_MODES, first=7, limit=7), growing, 4)} == {7}


def test_a_smaller_last_block_does_not_count():
    block = BlockSearch(AUTODIFF_MODES, first=4, limit=100)
    block.report(3, 1e-9)
    assert (block.mode, block.size) == (FORWARD, 4)


def batch(x):
    net = mlp(inputs=x.shape[1])
    return TargetBatch(net, lambda z, classes: z.gather(1, classes), x, torch.tensor([[0, 2]] * len(x)))


def run(given, modes=AUTODIFF_MODES, first_block=256, largest_block=30_000):
    generator = torch.Generator().manual_seed(0)
    return hessians(given, modes, first_block=first_block, largest_block=largest_block, generator=generator)


@pytest.fixture
def given():
    return batch(torch.randn(3, 40, dtype=F64))


def expected_of(given):
    network = given.network
    return torch.stack([torch.func.hessian(lambda v: network(v[None])[0, [0, 2]])(x) for x in given.x]).detach()


def test_columns_of_both_modes_side_by_side(given, monkeypatch):
    used = []
    for autodiff in (ForwardOverReverse, ReverseOverReverse):
        columns = autodiff.columns

        def noted(self, basis, columns=columns):
            used.append((self.mode, len(basis)))
            return columns(self, basis)

        monkeypatch.setattr(autodiff, "columns", noted)
    found, num_columns = run(given, first_block=7, largest_block=7)
    assert num_columns == {mode: sum(count for name, count in used if name == mode) for mode in AUTODIFF_MODES}
    assert {name for name, _ in used} == set(AUTODIFF_MODES)
    assert sum(count for _, count in used) == 40  # no column is computed twice
    torch.testing.assert_close(found, expected_of(given), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("autodiff", [ForwardOverReverse, ReverseOverReverse])
def test_out_of_memory_halves_the_block_and_tries_again(given, monkeypatch, autodiff):
    columns, sizes = autodiff.columns, []

    def small(self, basis):
        sizes.append(len(basis))
        if len(basis) > 5:
            raise torch.OutOfMemoryError("no more")
        return columns(self, basis)

    monkeypatch.setattr(autodiff, "columns", small)
    found, num_columns = run(given, modes=(autodiff.mode,))
    assert num_columns == {autodiff.mode: 40}
    assert max(sizes) == 40
    assert sizes[-1] <= 5
    torch.testing.assert_close(found, expected_of(given), rtol=1e-10, atol=1e-13)


def test_out_of_memory_with_a_single_column_raises(given, monkeypatch):
    def never(self, basis):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(ReverseOverReverse, "columns", never)
    with pytest.raises(torch.OutOfMemoryError):
        run(given, modes=(REVERSE,))


def test_one_mode_has_its_graph_in_memory_at_a_time(given, monkeypatch):
    alive = weakref.WeakSet()
    for autodiff in (ForwardOverReverse, ReverseOverReverse):
        columns = autodiff.columns

        def noted(self, basis, columns=columns):
            alive.add(self)
            assert {other.mode for other in alive} == {self.mode}
            return columns(self, basis)

        monkeypatch.setattr(autodiff, "columns", noted)
    _, num_columns = run(given, first_block=7, largest_block=7)
    assert set(num_columns) == set(AUTODIFF_MODES)


def test_the_mode_that_computed_most_columns_is_recorded(given, monkeypatch):
    """Two groups: neither the last of them nor the mode that would be next decides."""
    num_columns = iter([Counter({FORWARD: 30, REVERSE: 10}), Counter({FORWARD: 15, REVERSE: 25})])
    whole = dense.hessians
    monkeypatch.setattr(dense, "hessians", lambda *a, **how: (whole(*a, **how)[0], next(num_columns)))
    few = given.select(slice(0, 2))
    one_at_a_time = result_bytes(few, Options()) + int(1.5 * dense_bytes(ModelCosts(few)))
    spectrum = measure(few, "logit", Options(method="dense", max_memory=one_at_a_time)).spectrum
    assert spectrum.autodiff_mode == FORWARD
    assert next(num_columns, None) is None


def test_symmetrize_raises_where_it_would_copy():
    with pytest.raises(RuntimeError, match="view"):
        symmetrize_(torch.randn(3, 2, 4, 4).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_symmetrize(dtype):
    matrices = torch.randn(2, 3, 5, 5).to(dtype)
    matrices[1, 2] = 0
    before = matrices.clone()
    asymmetry = symmetrize_(matrices)
    assert torch.equal(matrices, matrices.mT)
    torch.testing.assert_close(matrices, (before + before.mT) / 2)
    norm = torch.linalg.matrix_norm(before).clamp_min(1e-30)
    torch.testing.assert_close(asymmetry, torch.linalg.matrix_norm(before - before.mT) / norm)
    assert asymmetry[1, 2] == 0
