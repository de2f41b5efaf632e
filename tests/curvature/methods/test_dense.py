"""Column blocks: their size, autodiff modes that fail, out-of-memory, symmetry."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from support.networks import measure, mlp

from lightning_hessian import input_hessian
from lightning_hessian.curvature import cost_model
from lightning_hessian.curvature.cost_model import ModelCosts, columns_bytes, dense_bytes, result_bytes
from lightning_hessian.curvature.methods import columns, dense
from lightning_hessian.curvature.methods.columns import BlockSize, hessians, symmetrize_
from lightning_hessian.curvature.methods.interface import MethodInput
from lightning_hessian.curvature.operators.autodiff import ForwardOverReverse, ReverseOverReverse, gradients
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch

F64 = torch.float64
FORWARD, REVERSE = AUTODIFF_MODES = ("forward_over_reverse", "reverse_over_reverse")


def sizes(block, num_columns, per_column, shared=0):
    """Columns and whether they are counted, of every block that computes ``num_columns``."""
    seen = []
    while num_columns:
        count = block.next(num_columns)
        counted = block.is_to_be_counted(count)
        if counted:
            block.report(count, shared + count * per_column)
        seen.append((count, counted))
        num_columns -= count
    return seen


def test_what_surely_is_small_is_one_block_and_not_counted():
    assert sizes(BlockSize(800, memory=10**9, estimate=10**5), 800, 10**4) == [(800, False)]


def test_the_first_block_is_counted_and_the_others_fill_memory():
    assert sizes(BlockSize(800, memory=10**8, estimate=10**6, pages_kept=True), 800, 250_000) == [
        (100, True),  # an eighth: 100 surely fit
        (350, True),  # of the 700 that are left, 400 fit
        (350, False),
    ]


def test_in_little_memory_blocks_grow_as_far_as_is_known_to_fit():
    """What is shared by the columns of a block counts less and less."""
    memory, shared, per_column = 10**6, 4 * 10**5, 10**4
    found = sizes(BlockSize(400, memory, estimate=10**6, pages_kept=True), 400, per_column, shared)
    assert found[:4] == [(1, True), (2, True), (4, True), (9, True)]
    assert all(shared + count * per_column <= memory for count, _ in found)
    assert max(count for count, _ in found) >= 40


def test_blocks_stay_smaller_where_touching_memory_costs_time():
    """With 8 GB in all, sqrt(8 GB · 7 MiB) = 242 MB."""
    kept = sizes(BlockSize(800, memory=10**11, estimate=4 * 10**7, pages_kept=True), 800, 10**7)
    returned = sizes(BlockSize(800, memory=10**11, estimate=4 * 10**7), 800, 10**7)
    assert kept == [(3, True), (797, True)]
    assert returned[:3] == [(3, True), (24, True), (24, False)]
    assert {count for count, _ in returned[3:]} == {23, 24}


def test_where_pages_are_returned_a_part_of_memory_is_lost_to_holes():
    block = BlockSize(800, memory=3 * 10**8, estimate=10**7)
    block.report(1, 10**7)
    assert block.next(800) == 10


def test_a_given_size_stays():
    assert sizes(BlockSize(40, memory=1, estimate=10**9, fixed=7), 40, 10**9) == [
        *((7, False),) * 4,
        *((6, False),) * 2,
    ]


def test_out_of_memory_bounds_what_follows():
    block = BlockSize(100, memory=10**9, estimate=1)
    block.halve(block.next(100))
    assert block.next(100) == 50
    block.report(50, 50)
    assert block.next(50) == 50


def batch(x):
    net = mlp(inputs=x.shape[1])
    return TargetBatch(net, lambda z, classes: z.gather(1, classes), x, torch.tensor([[0, 2]] * len(x)))


def run(given, modes=AUTODIFF_MODES, **how):
    generator = torch.Generator().manual_seed(0)
    options = {"memory": 10**9, "column_estimate": 1, **how}
    found = hessians(given, modes, generator=generator, **options)
    return found.matrices, found.num_columns


@pytest.fixture
def given():
    return batch(torch.randn(3, 40, dtype=F64))


def expected_of(given):
    network = given.network
    return torch.stack([torch.func.hessian(lambda v: network(v[None])[0, [0, 2]])(x) for x in given.x]).detach()


@pytest.mark.parametrize("autodiff", [ForwardOverReverse, ReverseOverReverse])
@pytest.mark.parametrize("memory", [10**9, 50_000])
def test_no_column_is_computed_twice(given, monkeypatch, autodiff, memory):
    used, columns = [], autodiff.columns
    monkeypatch.setattr(autodiff, "columns", lambda self, basis: used.append(len(basis)) or columns(self, basis))
    found, num_columns = run(given, [autodiff.mode], memory=memory, column_estimate=4_000)
    assert num_columns == {autodiff.mode: 40}
    assert sum(used) == 40
    assert (len(used) == 1) == (memory == 10**9)
    torch.testing.assert_close(found, expected_of(given), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("wrong", ["raises", "zero", "asymmetric", "nan"])
def test_a_forward_mode_that_fails_is_replaced(given, monkeypatch, wrong):
    right = ForwardOverReverse.columns

    def columns(self, basis):
        if wrong == "raises":
            raise NotImplementedError("no forward-mode rule")
        found = right(self, basis)
        if wrong == "zero":
            return torch.zeros_like(found)
        return found.masked_fill(basis.mT[:10].sum(0) > 0, 1.0 if wrong == "asymmetric" else torch.nan)

    monkeypatch.setattr(ForwardOverReverse, "columns", columns)
    found, num_columns = run(given)
    assert num_columns == {REVERSE: 40}
    torch.testing.assert_close(found, expected_of(given), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("autodiff", [ForwardOverReverse, ReverseOverReverse])
@pytest.mark.parametrize("memory", [10**9, 50_000])
def test_values_and_gradients_come_with_the_columns(given, autodiff, memory):
    generator = torch.Generator().manual_seed(0)
    for split in (False, True):
        found = hessians(
            given,
            [autodiff.mode],
            memory=memory,
            column_estimate=4_000,
            generator=generator,
            split_classes=split,
        )
        values, gradient = found.first_derivatives
        torch.testing.assert_close(found.matrices, expected_of(given), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(values, given.values(given.x))
        torch.testing.assert_close(gradient, gradients(given))


def test_small_tensors_are_left_to_reverse_mode(monkeypatch):
    """A class counts as a sample there; where that fails, forward mode is next."""
    used = []
    for autodiff in (ForwardOverReverse, ReverseOverReverse):
        columns = autodiff.columns

        def noting(self, basis, columns=columns):
            used.append((self.mode, self.batch.shape[:2]))
            if fails == self.mode:
                raise RuntimeError("no second derivative")
            return columns(self, basis)

        monkeypatch.setattr(autodiff, "columns", noting)
    net, x, fails = mlp(inputs=40), torch.randn(3, 40, dtype=F64), None
    small = input_hessian(net, x, [0, 2])
    assert used == [(REVERSE, (6, 1))]
    fails = REVERSE
    torch.testing.assert_close(input_hessian(net, x, [0, 2]), small)
    assert used[1:] == [(REVERSE, (6, 1)), (FORWARD, (3, 2))]
    used.clear()
    fails = None
    input_hessian(mlp(inputs=300, width=2000), torch.randn(3, 300, dtype=F64), [0, 2], check=False)
    assert used[0] == (FORWARD, (3, 2))


def test_a_hessian_that_is_zero_is_computed_once(monkeypatch):
    """One HVP confirms that forward mode's zeros are right."""
    net = torch.nn.Linear(6, 3).double()
    given = TargetBatch(net, lambda z, c: z.gather(1, c), torch.randn(2, 6, dtype=F64), torch.zeros(2, 1).long())
    found, num_columns = run(given)
    assert not found.any()
    assert num_columns == {FORWARD: 6}


def test_a_hessian_that_is_not_finite_leaves_the_others(monkeypatch):
    x = torch.randn(3, 4, dtype=F64).abs() + 1
    x[1] = 0  # the second derivative of x^1.5 is infinite there
    classes = torch.zeros(3, 1, dtype=torch.long)
    given = TargetBatch(lambda x: x.pow(1.5).sum(1, keepdim=True), lambda z, c: z.gather(1, c), x, classes)
    found = dense.dense_spectrum(method_input(given))
    eigenvalues = found.decomposition.eigenvalues[:, 0]
    assert eigenvalues[1].isnan().all()
    assert not found.decomposition.converged[1].any()
    torch.testing.assert_close(eigenvalues[[0, 2]], (0.75 * x[[0, 2]].rsqrt()).sort(descending=True).values)
    assert found.decomposition.trace.isfinite().flatten().tolist() == [True, False, True]


def method_input(given, **how):
    memory = 10**9
    costs, gradient = ModelCosts(given, memory), torch.ones(given.shape, dtype=F64)
    return MethodInput(given, costs, gradient, piecewise_linear=False, options=Options(), memory_budget=memory, **how)


@pytest.mark.parametrize("mode", AUTODIFF_MODES)
def test_the_modes_can_be_chosen(given, mode):
    found = dense.dense_spectrum(method_input(given, modes=(mode,)))
    assert found.autodiff_mode == mode


def test_thousands_of_small_samples_are_one_group(monkeypatch):
    groups, whole = [], dense.hessians
    monkeypatch.setattr(dense, "hessians", lambda few, *a, **how: groups.append(len(few.x)) or whole(few, *a, **how))
    found = dense.whole_hessians(method_input(batch(torch.randn(5000, 2, dtype=F64)))).matrices
    assert groups == [5000]
    assert torch.equal(found, found.mT)


@pytest.mark.parametrize("autodiff", [ForwardOverReverse, ReverseOverReverse])
def test_out_of_memory_halves_the_block_and_tries_again(given, monkeypatch, autodiff):
    columns, sizes = autodiff.columns, []

    def small(self, basis):
        sizes.append(len(basis))
        if len(basis) > 5:
            raise torch.OutOfMemoryError("no more")
        return columns(self, basis)

    monkeypatch.setattr(autodiff, "columns", small)
    found, num_columns = run(given, (autodiff.mode,))
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


def test_the_mode_that_computed_most_columns_is_recorded(given, monkeypatch):
    """Two groups: neither the last of them nor the mode that would be next decides."""
    num_columns = iter([Counter({FORWARD: 30, REVERSE: 10}), Counter({FORWARD: 15, REVERSE: 25})])
    whole = dense.hessians
    monkeypatch.setattr(dense, "hessians", lambda *a, **how: replace(whole(*a, **how), num_columns=next(num_columns)))
    few = given.select(slice(0, 2))
    one_at_a_time = result_bytes(few, Options()) + int(1.5 * dense_bytes(ModelCosts(few)))
    spectrum = measure(few, "logit", Options(method="dense", max_memory=one_at_a_time)).spectrum
    assert spectrum.autodiff_mode == FORWARD
    assert next(num_columns, None) is None


def test_symmetrize_raises_where_it_would_copy():
    with pytest.raises(RuntimeError, match="view"):
        symmetrize_(torch.randn(3, 2, 4, 4).transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("scratch", [1, 400, 10**6])
def test_symmetrize(dtype, scratch, monkeypatch):
    monkeypatch.setattr(columns, "SCRATCH_BYTES", scratch)
    matrices = torch.randn(2, 3, 5, 5).to(dtype)
    matrices[1, 2] = 0
    before = matrices.clone()
    asymmetry = symmetrize_(matrices)
    assert torch.equal(matrices, matrices.mT)
    torch.testing.assert_close(matrices, (before + before.mT) / 2)
    norm = torch.linalg.matrix_norm(before).clamp_min(1e-30)
    torch.testing.assert_close(asymmetry, torch.linalg.matrix_norm(before - before.mT) / norm)
    assert asymmetry[1, 2] == 0


def test_the_estimate_of_a_column_is_for_all_samples(monkeypatch):
    estimates = []

    def noting(*arguments, column_estimate, **more):
        estimates.append(column_estimate)
        return hessians(*arguments, column_estimate=column_estimate, **more)

    monkeypatch.setattr(dense, "hessians", noting)
    for num_samples in (1, 3):
        input_hessian(mlp(), torch.randn(num_samples, 6, dtype=F64), 0, check=False)
    assert estimates[1] == 3 * estimates[0]


def test_whole_hessians_and_the_norms_of_their_terms_need_room_at_once():
    batch = TargetBatch(
        mlp(outputs=500), lambda z, c: z.gather(1, c), torch.randn(2, 6, dtype=F64), torch.zeros(2, 1).long()
    )
    costs = ModelCosts(batch)
    vars(costs).update(gradient_bytes=0, matvec_bytes=0)  # without what their graphs take
    gradients = costs.num_outputs * 3 * 6 * 8
    assert dense_bytes(costs) >= 4 * costs.matrix_bytes + gradients


def test_a_block_of_columns_has_the_memory_that_the_matrices_leave(given, monkeypatch):
    budgets = []

    def noting(*arguments, memory, **more):
        budgets.append(memory)
        return hessians(*arguments, memory=memory, **more)

    monkeypatch.setattr(dense, "hessians", noting)
    costs, totals = ModelCosts(given), (10**9, 10**6)
    for total in totals:
        dense.whole_hessians(replace(method_input(given), memory_budget=total))
    dense.dense_spectrum(replace(method_input(given), memory_budget=10**9))
    beside = 3 * 2 * costs.matrix_bytes  # as columns and as rows
    assert budgets == [*(total - beside for total in totals), 10**9 - 3 * costs.eigendecomposition_bytes]


def test_matrices_that_are_not_decomposed_need_no_room_for_that(given, monkeypatch):
    """All samples are one group where only their matrices fit."""
    groups = []

    def noting(few, *arguments, **more):
        groups.append(few.num_samples)
        return hessians(few, *arguments, **more)

    monkeypatch.setattr(dense, "hessians", noting)
    made = method_input(given)
    monkeypatch.setattr(cost_model, "GROUP_BYTES", 3 * columns_bytes(made.costs))
    dense.whole_hessians(made)
    assert groups == [3]


def test_the_matrices_of_the_first_samples_come_with_their_spectra(given):
    every = dense.whole_hessians(method_input(given)).matrices
    for memory in (10**9, int(1.5 * dense_bytes(ModelCosts(given)))):  # all samples at once, and one at a time
        found = dense.dense_spectrum(replace(method_input(given, num_matrices=2), memory_budget=memory))
        assert found.matrices.shape[0] == 2
        torch.testing.assert_close(found.matrices, every[:2])
