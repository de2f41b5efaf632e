"""Whole Hessians of as many samples at a time as fit memory, and their complete spectra: the method ``dense``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lightning_hessian.curvature.batching import concatenate, in_groups
from lightning_hessian.curvature.checks.prediction import Prediction, predict, quadratic_form
from lightning_hessian.curvature.cost_model import (
    ModelCosts,
    columns_bytes,
    dense_bytes,
    gauss_newton_hessian_bytes,
    group_size,
    hessian_bytes,
)
from lightning_hessian.curvature.memory import return_pages
from lightning_hessian.curvature.meter import Pace
from lightning_hessian.curvature.methods.columns import WholeHessians, hessians, most_common, symmetrize_
from lightning_hessian.curvature.methods.duration import check_pace
from lightning_hessian.curvature.methods.interface import MethodInput, MethodResult
from lightning_hessian.curvature.operators.autodiff import AutodiffMode
from lightning_hessian.curvature.operators.gauss_newton import TermNorms, gauss_newton_hessians, term_norms
from lightning_hessian.curvature.spectrum import (
    Decomposition,
    eigenpairs,
    exact_decomposition,
    zero_decomposition,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


def dense_spectrum(given: MethodInput) -> MethodResult:
    """All D eigenvalues of every problem, from whole Hessians.

    Cost: D columns per problem, each (1 + K)/2 to K gradients of the batch, and D³ for the eigenvalues.
    """
    pace = _pace(given)

    def work(samples: slice) -> tuple[Decomposition, Prediction, Tensor, Counter[AutodiffMode]]:
        found_whole = _hessians(given, samples, pace, decomposed=True)
        whole, asymmetry, by_mode = found_whole.matrices, found_whole.asymmetry, found_whole.num_columns
        terms = term_norms(given.batch.select(samples), whole)
        gradient = given.gradient[samples]
        found = decompose(whole, gradient, given.options.num_eigenvalues, terms, asymmetry)
        top, norm = found.eigenvectors[:, :, 0], found.eigenvalues.abs().amax(-1)
        prediction = predict(gradient, top, norm, lambda w: quadratic_form(whole, w), given.options.generator())
        return found, prediction, whole[: max(0, given.num_matrices - samples.start)].clone(), by_mode

    groups, predictions, matrices, num_columns = [], [], [], Counter[AutodiffMode]()
    for samples, (found, prediction, first_matrices, by_mode) in in_groups(
        given.batch.num_samples, _group_size(given, dense_bytes), work
    ):
        groups.append(found)
        predictions.append(prediction)
        matrices.append(first_matrices)
        for mode, count in by_mode.items():
            num_columns[mode] += count * (samples.stop - samples.start)
        return_pages(given.memory_budget)
    return MethodResult(
        concatenate(groups),
        concatenate(predictions),
        num_matvecs=given.batch.num_inputs,
        autodiff_mode=most_common(num_columns),
        matrices=torch.cat(matrices) if len(matrices) > 1 else matrices[0],
    )


def whole_hessians(given: MethodInput) -> WholeHessians:
    """Symmetric whole Hessians of all samples; those of a single group are not copied."""
    groups, matrices, pace = [], None, _pace(given)
    for samples, found in in_groups(
        given.batch.num_samples, _group_size(given, columns_bytes), lambda samples: _hessians(given, samples, pace)
    ):
        if len(found.matrices) == given.batch.num_samples:
            return found
        if matrices is None:
            matrices = found.matrices.new_empty(*given.batch.shape, given.batch.num_inputs)
        matrices[samples] = found.matrices
        groups.append(replace(found, matrices=found.asymmetry))
        del found  # the matrices
        return_pages(given.memory_budget)
    assert matrices is not None
    num_columns = sum((found.num_columns for found in groups), Counter[AutodiffMode]())
    firsts = [found.first_derivatives for found in groups if found.first_derivatives is not None]
    first = (torch.cat([values for values, _ in firsts]), torch.cat([g for _, g in firsts])) if firsts else None
    return WholeHessians(matrices, torch.cat([found.asymmetry for found in groups]), num_columns, first)


def _pace(given: MethodInput) -> Pace:
    return Pace(given.limit, given.batch.num_samples * given.batch.num_inputs)


def _hessians(given: MethodInput, samples: slice, pace: Pace, *, decomposed: bool = False) -> WholeHessians:
    """Those of some samples, JᵀAJ if that is exact, else by columns.

    ``decomposed``: whether eigendecompositions follow, for which there must be time too.
    """
    batch, costs, options = given.batch.select(samples), given.costs, given.options
    if _as_gauss_newton(given):
        matrices = gauss_newton_hessians(batch)
        return WholeHessians(matrices, symmetrize_(matrices), Counter())

    def progress(what: str, done: int, _: int | None) -> None:
        num_inputs = batch.num_inputs
        num_samples, num_done = given.batch.num_samples, samples.start * num_inputs + done
        given.progress(what, num_done, num_samples * num_inputs)
        check_pace(given, pace, num_done, (num_samples - samples.start) * batch.num_classes if decomposed else 0)

    beside_a_block = costs.eigendecomposition_bytes if decomposed else costs.copied_matrix_bytes
    one_by_one = costs.calls_dominate
    return hessians(
        batch,
        ("reverse_over_reverse", *given.modes) if one_by_one and len(given.modes) > 1 else given.modes,
        split_classes=one_by_one,
        memory=max(1, given.memory_budget - batch.num_samples * beside_a_block),
        column_estimate=costs.column_estimate * batch.num_samples,
        generator=options.generator(),
        chunk_size=None if options.chunk_size == "auto" else options.chunk_size,
        in_parts=given.limit.max_seconds is not None,
        progress=progress,
    )


def _as_gauss_newton(given: MethodInput) -> bool:
    """Whether whole Hessians are computed as JᵀAJ: where it is exact and fits, and ``dense`` was not asked for."""
    exact = given.piecewise_linear and given.options.method != "dense"
    return exact and gauss_newton_hessian_bytes(given.costs) <= given.memory_budget


def _group_size(given: MethodInput, num_bytes: Callable[[ModelCosts], int]) -> int:
    """How many samples' whole Hessians fit the memory, with what else takes ``num_bytes`` of one where that fits."""
    costs, memory_budget = given.costs, given.memory_budget
    if _as_gauss_newton(given):
        return memory_budget // gauss_newton_hessian_bytes(costs)
    wanted = num_bytes(costs)
    per_sample = wanted if wanted <= memory_budget else min(wanted, hessian_bytes(costs))
    what = f"The whole Hessians ({given.batch.num_classes} classes, D = {given.batch.num_inputs})"
    return group_size(given.batch, per_sample, memory_budget, what)


def decompose(
    matrices: Tensor, gradient: Tensor, num_vectors: int, terms: TermNorms, asymmetry: Tensor
) -> Decomposition:
    """The complete eigendecomposition of symmetric ``[n, K, D, D]``; ``asymmetry``: what they had before.

    Residuals are measured, for every pair. Problems whose matrix is not finite get NaN; the others are not affected.
    Cost: one ``eigh`` per problem, D³.
    """
    num_inputs = matrices.shape[-1]
    finite = matrices.isfinite().flatten(2).all(-1)
    if not finite.all():
        numbers = decompose(matrices.where(finite[..., None, None], 0), gradient, num_vectors, terms, asymmetry)
        return _with_nan(numbers, ~finite)
    if not matrices.any():
        zero = zero_decomposition(gradient, num_inputs, num_vectors)
        return replace(
            zero, gauss_newton_norm=terms.gauss_newton, functional_norm=terms.functional, asymmetry=asymmetry
        )
    pairs, vectors = eigenpairs(matrices, num_vectors)
    index = pairs["vector_index"]
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    along = (matrices @ gradient.unsqueeze(-1)).squeeze(-1)
    return exact_decomposition(
        **pairs,
        eigenvectors=vectors.mT.gather(-2, index.unsqueeze(-1).expand(*index.shape, num_inputs)),
        trace=diagonal.sum(-1),
        frobenius_norm=torch.linalg.matrix_norm(matrices),
        gauss_newton_norm=terms.gauss_newton,
        functional_norm=terms.functional,
        diagonal=diagonal.clone(),  # a view would keep the matrices in memory
        gradient_curvature=(gradient * along).sum(-1) / gradient.square().sum(-1),
        asymmetry=asymmetry,
    )


def _with_nan(found: T, where: Tensor) -> T:
    """The same with NaN for the problems ``[n, K]`` at which ``where`` is True."""
    changed: dict[str, Any] = {}
    for field in fields(found):
        value = getattr(found, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            changed[field.name] = _with_nan(value, where)
        elif isinstance(value, Tensor) and value.is_floating_point():
            changed[field.name] = value.masked_fill(where.reshape(*where.shape, *(1,) * (value.dim() - 2)), torch.nan)
        elif isinstance(value, Tensor) and value.dtype == torch.bool:  # ``converged``
            changed[field.name] = value & ~where.unsqueeze(-1)
    return replace(found, **changed)
