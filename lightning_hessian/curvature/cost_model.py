"""Bytes and seconds: what derivatives of a model cost, and what each method therefore needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.hutchinson import NUM_VECTORS
from lightning_hessian.curvature.algorithms.lanczos import basis_size
from lightning_hessian.curvature.algorithms.quadrature import NUM_STEPS
from lightning_hessian.curvature.batching import on_few
from lightning_hessian.curvature.memory import allocated_per_sample, readable
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse, gradients
from lightning_hessian.curvature.operators.gauss_newton import (
    OUTPUT_HVP_TENSORS,
    VMAPPED_OUTPUTS,
    GaussNewtonOperator,
)
from lightning_hessian.curvature.options import MethodName, Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import MeasurementError

# What derivatives take at their peak, in units of (1 + K) times what one forward pass allocates: 0.3 to 2.9 for MLPs,
# convolutions, transformers and recurrent networks with K = 1 and 10.
FORWARDS_PER_PASS = 4
FORWARDS_PER_GRADIENT = 3  # the same of a gradient: 1.7 to 2.2, all that a forward and a backward pass make
# Up to which the time of an operation on a tensor is that of its call: reverse_over_reverse is faster then, which calls
# a third as many as forward_over_reverse. Two cores, benchmarks/dense.py: between 100 and 600 kB.
BYTES_OF_A_CALL = 256 * 2**10
SURELY = 4  # estimates are good enough where that many times as much fits for all samples, their results included

# Seconds per D³ of an eigendecomposition with vectors on one CPU core: 6e-11 to 1.3e-10 in float32, by LAPACK, at
# D = 256 to 3072. Float64 moves twice the bytes. Accelerators and several cores are faster: an upper figure there.
EIGH_SECONDS = {torch.float32: 1e-10, torch.float64: 2e-10}
# A column in a block by forward_over_reverse over an HVP on a retained graph, K = 1 (benchmarks/dense.py: 0.6 to 1.0).
COLUMN_IN_MATVECS = 0.7
GRADIENT_IN_MATVECS = 0.5  # one of the C gradients of a sample's outputs over an HVP (0.3), and its share of a QR
LANCZOS_OVERHEAD = 1.1  # a Lanczos iteration, orthogonalisation included, over its HVP (benchmarks/lanczos.py)


@dataclass(frozen=True)
class ForwardPass:
    """What a forward pass showed.

    Attributes:
        outputs: ``[N, C]``.
        bytes_per_sample: of all tensors that it makes.
        num_tensors: that it makes.
        is_curved: whether one is made by an operation that surely curves what it is applied to, such as tanh.
    """

    outputs: Tensor
    bytes_per_sample: int
    num_tensors: int = 1
    is_curved: bool = False

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.outputs.shape[1]


@dataclass(frozen=True)
class ModelCosts:
    """What derivatives of a model cost, each number found when first asked for: they are the same for every sample.

    Bytes are upper bounds. Where ``memory`` is far more than all samples need by an estimate from one forward pass,
    they are that estimate. Elsewhere they are counted in passes made for this, over two samples, or over one where two
    do not fit the device.

    Args:
        batch: what is differentiated.
        memory: bytes that may be used; with 0, all bytes are counted.
        forward: what a forward pass of the network has shown already.
        counted: bytes that were counted before, by work and sizes of tensors; new counts are added.
    """

    batch: TargetBatch
    memory: int = 0
    forward: ForwardPass | None = None
    counted: dict[tuple[object, ...], int] = field(default_factory=dict)

    @cached_property
    def num_outputs(self) -> int:
        """C, the outputs of the network."""
        if self.forward is not None:
            return self.forward.num_outputs
        with torch.no_grad():
            return on_few(self.batch, 2, lambda few: few.outputs(few.x).shape[1])

    @cached_property
    def forward_bytes(self) -> int:
        """All tensors that a forward pass of one sample makes, and the sample."""
        if self.forward is not None:
            return self.forward.bytes_per_sample + self.vector_bytes
        return allocated_per_sample(self.batch, _forward) + self.vector_bytes

    @property
    def calls_dominate(self) -> bool:
        """Whether all columns of all problems at once are work of small tensors, whose time is that of the calls."""
        if self.forward is None:
            return False
        columns = math.prod(self.batch.shape)
        return columns * self.forward.bytes_per_sample <= BYTES_OF_A_CALL * self.forward.num_tensors

    @property
    def column_estimate(self) -> int:
        """One column of one sample's K matrices, more than it takes at its peak."""
        return self._estimate(self.batch.num_classes)

    @cached_property
    def matvec_bytes(self) -> int:
        """One HVP of one sample's K problems, graph included."""
        return self._estimate_or(self.batch.num_classes, _matvec, self.batch)

    @cached_property
    def split_matvec_bytes(self) -> int:
        """One HVP of one problem, where every class is a sample of its own (``split_classes``)."""
        if self.batch.num_classes == 1:
            return self.matvec_bytes
        return self._estimate_or(1, _matvec, self._split)

    @cached_property
    def gauss_newton_matvec_bytes(self) -> int:
        """One product with JᵀAJ of one problem, graphs included."""
        return self._estimate_or(1, _gauss_newton_matvec, self._split)

    @cached_property
    def gradient_bytes(self) -> int:
        """One gradient of one output of one sample."""
        single = replace(self.batch, classes=self.batch.classes[:, :1])
        estimate = FORWARDS_PER_GRADIENT * self.forward_bytes
        return self._estimate_or(1, gradients, single, estimate)

    def _estimate(self, num_classes: int) -> int:
        return FORWARDS_PER_PASS * (1 + num_classes) * self.forward_bytes

    def _estimate_or(
        self,
        num_classes: int,
        work: Callable[[TargetBatch], object],
        batch: TargetBatch,
        estimate: int | None = None,
    ) -> int:
        """The estimate, by default that of an HVP, where memory is plenty, else what ``work`` is seen to allocate."""
        matrices = self.eigendecomposition_bytes
        results = max(self.batch.num_classes * 256 * self.vector_bytes, matrices if matrices <= self.memory else 0)
        passes = self.batch.num_samples * self._estimate(self.batch.num_classes)
        if self.memory > 0 and SURELY * (passes + results) <= self.memory:
            return estimate or self._estimate(num_classes)
        key = (work, *batch.shape[1:], self.forward_bytes)
        if key not in self.counted:
            self.counted[key] = allocated_per_sample(batch, work)
        return self.counted[key]

    @property
    def vector_bytes(self) -> int:
        """One vector of one problem."""
        return self.batch.num_inputs * self.batch.x.element_size()

    @property
    def matrix_bytes(self) -> int:
        """The K matrices of one sample."""
        return self.batch.num_classes * self.batch.num_inputs * self.vector_bytes

    @property
    def copied_matrix_bytes(self) -> int:
        """The K matrices of one sample, as columns and as rows."""
        return 2 * self.matrix_bytes

    @property
    def eigendecomposition_bytes(self) -> int:
        """The K matrices of one sample with all that decomposing them makes: five more of the same size."""
        return 6 * self.matrix_bytes

    @property
    def _split(self) -> TargetBatch:
        return self.batch.select(slice(0, 2)).split_classes()


def _forward(few: TargetBatch) -> None:
    few.values(few.x.detach().clone().requires_grad_())  # as it will be differentiated: fused kernels hide what is made


def _matvec(few: TargetBatch) -> None:
    autodiff = ReverseOverReverse(few)
    autodiff.hvp(autodiff.gradient())


def _gauss_newton_matvec(few: TargetBatch) -> None:
    GaussNewtonOperator(few).matvec(few.x.flatten(1))


# Bytes per sample that is worked on at the same time


def hessian_bytes(costs: ModelCosts) -> int:
    """Whole Hessians of one sample, one column at a time, and their decomposition."""
    return costs.matvec_bytes + costs.eigendecomposition_bytes


def columns_bytes(costs: ModelCosts) -> int:
    """Whole Hessians of one sample, one column at a time, and nothing made of them."""
    return costs.matvec_bytes + costs.copied_matrix_bytes


def gauss_newton_hessian_bytes(costs: ModelCosts) -> int:
    """Whole JᵀAJ of one sample, and their decomposition."""
    return low_rank_bytes(costs) + costs.eigendecomposition_bytes


def dense_bytes(costs: ModelCosts) -> int:
    """The method ``dense``: whole Hessians, their decomposition, and the norms of their two terms."""
    _, num_classes, num_inputs = costs.batch.shape
    numbers = costs.num_outputs * (3 * num_inputs + OUTPUT_HVP_TENSORS * num_classes)
    term_norms = numbers * costs.batch.x.element_size() + _jacobian_graph_bytes(costs)
    return max(hessian_bytes(costs), 4 * costs.matrix_bytes + term_norms)


def low_rank_bytes(costs: ModelCosts) -> int:
    """The method ``low_rank``: C gradients, their QR decomposition, and products with it."""
    _, num_classes, num_inputs = costs.batch.shape
    c = costs.num_outputs
    numbers = num_inputs * c * (6 + 4 * num_classes) + 12 * (num_classes + 1) * c**2
    return numbers * costs.batch.x.element_size() + _jacobian_graph_bytes(costs)


def lanczos_bytes(costs: ModelCosts, options: Options) -> int:
    """The method ``lanczos``.

    Two graphs of the Hessian (a smaller one is built when half of the problems have converged) and one of JᵀAJ; the
    basis, its products and what is computed from both, and three vectors for every random one. With few outputs J and A
    are formed beside it (``low_rank_bytes``, and their copies for every class).
    """
    _, num_classes, num_inputs = costs.batch.shape
    max_basis = basis_size(options.num_eigenvalues, options.block_size)
    num_vectors = 6 * min(max_basis, num_inputs) + 4 * NUM_VECTORS + 4 * max(2, options.num_eigenvalues) + 10
    graphs = 2 * costs.split_matvec_bytes + costs.gauss_newton_matvec_bytes
    formed = low_rank_bytes(costs) if costs.num_outputs <= max_basis else 0
    projections = 6 * 8 * max_basis**2  # in float64, with what their eigendecomposition makes
    return formed + num_classes * (graphs + num_vectors * costs.vector_bytes + projections)


def method_bytes(method: MethodName, costs: ModelCosts, options: Options) -> int:
    """The memory that a method takes for each sample it works on at the same time."""
    if method == "lanczos":
        return lanczos_bytes(costs, options)
    return low_rank_bytes(costs) if method == "low_rank" else dense_bytes(costs)


def _jacobian_graph_bytes(costs: ModelCosts) -> int:
    return min(costs.num_outputs, VMAPPED_OUTPUTS) * costs.gradient_bytes


# Bytes of a whole measurement


def result_bytes(batch: TargetBatch, options: Options, num_matrices: int = 0) -> int:
    """The results of all samples, twice while groups are concatenated.

    These are eigenvectors, gradients, diagonals and directions of predictions, and the whole matrices of the first
    ``num_matrices`` samples.
    """
    num_vectors = min(options.num_eigenvalues, batch.num_inputs) + 7
    return vector_bytes(batch, batch.num_samples * num_vectors + num_matrices * batch.num_inputs)


def vector_bytes(batch: TargetBatch, num_vectors: int) -> int:
    """That many vectors of every class, twice while groups are concatenated."""
    return 2 * batch.num_classes * num_vectors * batch.num_inputs * batch.x.element_size()


def least_memory(method: MethodName, batch: TargetBatch, costs: ModelCosts, options: Options) -> int:
    """The smallest ``max_memory`` with which a method works, one sample at a time."""
    return result_bytes(batch, options) + method_bytes(method, costs, options)


# Sizes that fit

# Of a CPU's memory for samples worked on at a time: larger groups are slower, 35 s and not 28 for 400 digits.
GROUP_BYTES = 2**30


def fitting_samples(memory: int, bytes_per_sample: int, device: torch.device) -> int:
    """How many samples to work on at a time: what fits ``memory``, and on a CPU ``GROUP_BYTES``, but at least one.

    Two may take more than ``GROUP_BYTES``: kernels may be wrong for a batch of one.
    """
    if device.type == "cpu":
        memory = min(memory, max(GROUP_BYTES, 2 * bytes_per_sample))
    return max(1, memory // bytes_per_sample)


def check_group(costs: ModelCosts, memory: int) -> int:
    """How many samples are compared with values at a time: five points of each, in float64, without a graph."""
    return fitting_samples(memory, 5 * 2 * costs.matvec_bytes, costs.batch.x.device)


def group_size(batch: TargetBatch, bytes_per_sample: int, memory_budget: int, what: str) -> int:
    """How many samples of a batch are worked on at the same time.

    Raises:
        MeasurementError: not even one fits.
    """
    if bytes_per_sample > memory_budget:
        raise MeasurementError(
            f"{what} of one sample takes {readable(bytes_per_sample)}, and {readable(memory_budget)} may be used "
            f"(max_memory). Look at fewer classes, allow more memory, or compute single HVPs with input_hvp."
        )
    return min(batch.num_samples, fitting_samples(memory_budget, bytes_per_sample, batch.x.device))


# Seconds


def expected_matvecs(num_inputs: int, options: Options) -> int:
    """The HVPs per problem that ``lanczos`` is expected to take.

    A basis filled once (trained networks need about half of that), random vectors, gradient, prediction, density.
    """
    basis = min(basis_size(options.num_eigenvalues, options.block_size), num_inputs)
    density = options.density_vectors * min(NUM_STEPS, num_inputs)
    return basis + NUM_VECTORS + 2 + density


def expected_work(shape: tuple[int, int, int], options: Options, num_matrices: int = 0) -> dict[MethodName, float]:
    """The HVPs of every problem that ``dense`` and ``lanczos`` are expected to cost as much as, eigenvalues aside.

    A column in a block costs ``COLUMN_IN_MATVECS`` at K = 1; one forward pass and tangent are shared by the K classes.

    Args:
        shape: (N, K, D).
        options: those of the measurement.
        num_matrices: for how many samples ``lanczos`` would be followed by all columns too.
    """
    num_samples, num_classes, num_inputs = shape
    columns = num_inputs * COLUMN_IN_MATVECS * (1 + num_classes) / (2 * num_classes)
    lanczos = expected_matvecs(num_inputs, options) * LANCZOS_OVERHEAD
    return {"dense": columns, "lanczos": lanczos + num_matrices / num_samples * columns}


def expected_seconds(
    shape: tuple[int, int, int],
    options: Options,
    seconds_per_matvec: float,
    eigh_seconds: float,
    num_matrices: int = 0,
) -> dict[MethodName, float]:
    """The time that ``dense`` and ``lanczos`` are expected to take.

    Args:
        shape, options, num_matrices: as for ``expected_work``.
        seconds_per_matvec: of one HVP of every problem.
        eigh_seconds: per D³ of an eigendecomposition.
    """
    num_samples, num_classes, num_inputs = shape
    seconds = {name: work * seconds_per_matvec for name, work in expected_work(shape, options, num_matrices).items()}
    seconds["dense"] += num_samples * num_classes * eigh_seconds * num_inputs**3
    return seconds
