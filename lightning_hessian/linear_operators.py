"""Symmetric matrices of one or many samples and classes as linear operators."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.hutchinson import Estimate, Estimates, RandomProducts, estimate
from lightning_hessian.curvature.algorithms.krylov import KnownProducts
from lightning_hessian.curvature.operators.blocks import ProblemBlocks
from lightning_hessian.curvature.operators.hessian import BatchOperator
from lightning_hessian.errors import ConfigurationError, whole_number
from lightning_hessian.model.prepare import ModelAccess

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SymmetricOperator:
    """Symmetric matrices ``[..., D, D]`` known by their products with vectors.

    Products are computed in ``dtype`` on ``device``, for vectors of any other too.

    Attributes:
        shape: ``(N, K, D, D)`` for all samples and classes, ``(D, D)`` for one of each.
        dtype: of the products.
        device: of the products.
    """

    def __init__(
        self, blocks: ProblemBlocks, kind: type[BatchOperator], problems: Tensor, access: ModelAccess, seed: int
    ) -> None:
        self._blocks = blocks
        self._kind = kind
        self._problems = problems  # [...], their numbers among those of the blocks
        self._access = access
        self._seed = seed
        num_inputs = blocks.whole.num_inputs
        self.shape = (*problems.shape, num_inputs, num_inputs)
        self.dtype = blocks.whole.x.dtype
        self.device = blocks.whole.x.device

    def __matmul__(self, v: Any) -> Tensor:
        """Products with one vector ``[D]``, or with M of them, the columns of ``[D, M]`` or ``[..., D, M]``.

        Shapes are those of ``torch.matmul``: ``[..., D]`` for one vector, ``[..., D, M]`` for M. For an own vector per
        matrix see ``matvec``.
        """
        v = torch.as_tensor(v)
        return self.matvec(v) if v.dim() < 2 else self._products(v.mT, v.shape).mT

    def matvec(self, v: Any) -> Tensor:
        """Each matrix times its own vector, ``[..., D]``, or all times the same one, ``[D]``; ``[..., D]``."""
        v = torch.as_tensor(v)
        return self._products(v.reshape(v.shape or 1).unsqueeze(-2), v.shape).squeeze(-2)

    def trace(self, num_vectors: int = 32) -> Estimate:
        """The trace of each matrix; exact, at D products, where ``num_vectors`` is D or more.

        Elsewhere Hutchinson's estimator from S random signs: unbiased, with a standard error of at most √(2/S) times
        the Frobenius norm, a quarter of it for S = 32.

        Args:
            num_vectors: S, the number of products; at least 2.

        Returns:
            An ``Estimate`` with ``value`` and its standard ``error``, both ``[...]``.
        """
        found, lead = self._estimates(num_vectors), self._problems.shape
        return Estimate(found.trace.reshape(lead), found.trace_error.reshape(lead))

    def diagonal(self, num_vectors: int = 32) -> Estimate:
        """The diagonal of each matrix, as ``trace`` (Bekas, Kokiopoulou and Saad 2007).

        Args:
            num_vectors: S, the number of products; at least 2.

        Returns:
            An ``Estimate`` with ``value`` and its standard ``error``, both ``[..., D]``.
        """
        found, shape = self._estimates(num_vectors), self.shape[:-1]
        return Estimate(found.diagonal.reshape(shape), found.diagonal_error.reshape(shape))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device={self.device})"

    def _products(self, vectors: Tensor, given: torch.Size) -> Tensor:
        """Of the matrices ``[..., D, D]`` with M vectors each, ``[..., M, D]``; ``given``: as a user shaped them."""
        *lead, size, _ = self.shape
        try:
            if vectors.shape[-1] != size or vectors.is_complex():
                raise RuntimeError
            vectors = vectors.detach().to(self.device, self.dtype).expand(*lead, *vectors.shape[-2:])
        except RuntimeError as error:
            raise ConfigurationError(
                f"Vectors of shape {tuple(given)} do not fit an operator of shape {self.shape}: @ takes [D], [D, M] or "
                f"[..., D, M], and matvec takes [D] or [..., D], of real numbers."
            ) from error
        flat = self._problems.flatten()
        with self._access.isolated():
            found = self._blocks.products(self._kind, vectors.reshape(len(flat), *vectors.shape[-2:]), flat)
        return found.reshape(vectors.shape)

    def _estimates(self, num_vectors: int) -> Estimates:
        """Of the matrices one after another, ``[P]``."""
        num_vectors = whole_number("num_vectors", num_vectors, 2)
        size = self.shape[-1]
        complete = num_vectors >= size
        basis = torch.eye(size if complete else 0, size)
        signs = torch.randint(2, (num_vectors, size), generator=torch.Generator().manual_seed(self._seed)) * 2.0 - 1
        num = self._problems.numel()
        inside = self._products(basis, basis.shape).reshape(num, *basis.shape)
        if complete:  # nothing is left to be estimated
            signs = torch.zeros(2, size)
            outside = inside.new_zeros(num, 2, size)
        else:
            outside = self._products(signs, signs.shape).reshape(num, *signs.shape)
        basis, signs = basis.to(inside), signs.to(inside)
        known = KnownProducts(basis.expand_as(inside), inside)
        return estimate(known, RandomProducts(signs, signs.expand_as(outside), outside))


class SampleHessian(SymmetricOperator):
    """The Hessian of one sample and class, ``[D, D]``."""

    def to_scipy(self) -> LinearOperator:
        """For SciPy's iterative solvers, such as ``scipy.sparse.linalg.eigsh``; products go through the CPU."""
        from scipy.sparse.linalg import LinearOperator

        def products(v: Any) -> Any:
            return (self @ v.reshape(len(v), -1)).cpu().numpy().reshape(v.shape)

        dtype = torch.empty(0, dtype=self.dtype).numpy().dtype
        return LinearOperator(self.shape, matvec=products, rmatvec=products, matmat=products, dtype=dtype)


class BatchedHessian(SymmetricOperator):
    """The Hessians of N samples and K classes, ``[N, K, D, D]``.

    Attributes: those of ``SymmetricOperator``, and

        classes: ``[N, K]``, the outputs looked at.
    """

    def __init__(
        self, blocks: ProblemBlocks, kind: type[BatchOperator], classes: Tensor, access: ModelAccess, seed: int
    ) -> None:
        self.classes = classes
        super().__init__(blocks, kind, torch.arange(classes.numel()).reshape(classes.shape), access, seed)

    __iter__ = None  # pairs of samples and classes are not a sequence

    def __getitem__(self, pair: tuple[int, int]) -> SampleHessian:
        """The Hessian of a sample, counted from 0, and a class, by its number among the outputs: ``H[0, 7]``."""
        num_samples = len(self.classes)
        try:
            sample, class_id = map(operator.index, pair)
        except (TypeError, ValueError):
            raise IndexError("Give a sample and a class, as whole numbers: H[sample, class_id].") from None
        if not -num_samples <= sample < num_samples:
            raise IndexError(
                f"There is no sample {sample}: give H[sample, class_id], samples from 0 to {num_samples - 1}."
            )
        known = self.classes[sample].tolist()
        if class_id not in known:
            raise IndexError(
                f"Class {class_id!r} is not looked at for sample {sample}: give H[sample, class_id], one of {known}."
            )
        problem = self._problems[sample, known.index(class_id)]
        return SampleHessian(self._blocks, self._kind, problem, self._access, self._seed)

    def to_scipy(self, sample: int, class_id: int) -> LinearOperator:
        """``H[sample, class_id].to_scipy()``: for SciPy's iterative solvers."""
        return self[sample, class_id].to_scipy()
