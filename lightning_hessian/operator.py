"""Input Hessians as linear operators, for any algorithm that asks for matrix-vector products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from lightning_hessian.curvature import functions
from lightning_hessian.curvature.checks.derivatives import CheckedDerivatives, about_invalid
from lightning_hessian.curvature.cost_model import ModelCosts
from lightning_hessian.curvature.memory import kept_pages
from lightning_hessian.curvature.operators.autodiff import random_vectors
from lightning_hessian.curvature.operators.blocks import ProblemBlocks
from lightning_hessian.curvature.operators.gauss_newton import GaussNewtonOperator
from lightning_hessian.curvature.operators.hessian import BatchOperator, HessianOperator
from lightning_hessian.curvature.options import ChunkSize, MethodChoice, Options
from lightning_hessian.curvature.spectrum import Spectrum
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.errors import ConfigurationError, warn
from lightning_hessian.linear_operators import BatchedHessian, SampleHessian
from lightning_hessian.model.arguments import Classes, Model, Target
from lightning_hessian.model.function import ForwardFunction, Inputs, ModelFunction
from lightning_hessian.model.isolation import ONE_AT_A_TIME
from lightning_hessian.model.outputs import OutputFunction
from lightning_hessian.model.prepare import ModelAccess, PreparedModel, prepare, usable_dtype

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OperatorOptions(TypedDict, total=False):
    """Arguments of every function on input Hessians, besides model, samples, classes and target.

    See ``input_hessian_operator``.
    """

    dtype: torch.dtype | None
    wrt: str | int | None
    check: bool
    max_memory: int | None
    seed: int
    forward_fn: ForwardFunction | None
    output_fn: OutputFunction | None


class InputHessianOperator(BatchedHessian):
    """The input Hessians of N samples and K classes, ``[N, K, D, D]``; made by ``input_hessian_operator``.

    Products (``@``, ``matvec``, ``trace``, ``diagonal``) are checked once: before the first one, a product along a
    random direction is compared with finite differences. ``gradient``, ``hvp``, ``to_dense`` and ``spectrum`` are
    checked as ``input_gradient``, ``input_hvp``, ``input_hessian`` and ``input_spectrum`` describe.
    """

    def __init__(self, access: ModelAccess, options: Options) -> None:
        self._batch = access.prepared.batch
        self._access = access
        self._memory = access.prepared.memory
        self._options = replace(options, max_memory=self._memory)
        costs = ModelCosts(self._batch, self._memory, access.prepared.forward)

        def rows_at_once(kind: type[BatchOperator]) -> int:
            of_term = kind is GaussNewtonOperator
            per_row = costs.gauss_newton_matvec_bytes if of_term else costs.split_matvec_bytes
            return max(1, self._memory // per_row)  # all that fit: their graph is kept, and need not be built again

        blocks = ProblemBlocks(self._batch, rows_at_once)
        super().__init__(blocks, HessianOperator, self._batch.classes, access, options.seed)

    @cached_property
    def gauss_newton(self) -> BatchedHessian:
        """The Gauss–Newton term JᵀAJ alone: the Hessian without the curvature of the network itself.

        J ``[C, D]`` is the Jacobian of the outputs, A ``[C, C]`` the Hessian of the target with respect to them. For a
        piecewise linear network, this is the whole Hessian; for ``"logit"``, it is zero. It is not checked against
        values.
        """
        return BatchedHessian(self._blocks, GaussNewtonOperator, self.classes, self._access, self._seed)

    @cached_property
    def valid(self) -> Tensor:
        """``[N, K]``, whether a product along a random direction agrees with values; all True with ``check=False``."""
        if not self._options.check:
            return torch.ones_like(self.classes, dtype=torch.bool)
        v = random_vectors(self._batch, self._options.generator())[:, :1].expand(self._batch.shape)
        with self._access.isolated() as prepared:
            found = functions.hvp(self._batch, v, self._options, prepared.forward)
        return _reported("HVP", found).valid

    def gradient(self) -> Tensor:
        """∇t, ``[N, K, D]``; see ``input_gradient``."""
        with self._without_graph() as prepared:
            found = functions.gradient(self._batch, self._options, prepared.forward)
        return _reported("gradient", found).numbers

    def hvp(self, v: Tensor) -> Tensor:
        """Products ``[N, K, D]``, each compared with values; see ``input_hvp``."""
        v = _per_problem(torch.as_tensor(v), self._batch)
        with self._without_graph() as prepared:
            found = functions.hvp(self._batch, v, self._options, prepared.forward)
        return _reported("HVP", found).numbers

    def to_dense(self, *, chunk_size: ChunkSize = "auto", max_seconds: float | None = None) -> Tensor:
        """The matrices ``[N, K, D, D]``; see ``input_hessian``."""
        options = replace(self._options, chunk_size=chunk_size, max_seconds=max_seconds)
        with self._without_graph() as prepared:
            found = functions.hessian(self._batch, options, prepared.forward, prepared.meter)
        return _reported("Hessian", found).numbers

    def spectrum(
        self,
        *,
        method: MethodChoice = "auto",
        num_eigenvalues: int = 10,
        block_size: int = 1,
        density_vectors: int = 0,
        chunk_size: ChunkSize = "auto",
        max_seconds: float | None = None,
    ) -> Spectrum:
        """Eigenvalues, with residuals and all derived quantities; see ``input_spectrum``."""
        options = replace(
            self._options,
            method=method,
            num_eigenvalues=num_eigenvalues,
            block_size=block_size,
            density_vectors=density_vectors,
            chunk_size=chunk_size,
            max_seconds=max_seconds,
        )
        with self._without_graph() as prepared:
            found = functions.spectrum(self._batch, prepared.target_name, options, prepared.forward, prepared.meter)
        if not found.valid.all():
            warn(about_invalid("spectrum", found.valid, found.diagnosis.message))
        return found

    def __getitem__(self, pair: tuple[int, int]) -> SampleHessian:
        """As for every ``BatchedHessian``."""
        _ = self.valid
        return super().__getitem__(pair)

    def close(self) -> None:
        """Frees the graph; nothing can be computed any more."""
        self._access.is_closed = True
        self._blocks.free()

    @contextmanager
    def _without_graph(self) -> Iterator[PreparedModel]:
        """The isolation, for work that counts on all of the memory; the next product builds its graph anew."""
        with self._access.isolated() as prepared:
            self._blocks.free()
            yield prepared

    def _products(self, vectors: Tensor, given: torch.Size) -> Tensor:
        _ = self.valid
        return super()._products(vectors, given)


@contextmanager
def input_hessian_operator(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    *,
    dtype: torch.dtype | None = None,
    wrt: str | int | None = None,
    check: bool = True,
    max_memory: int | None = None,
    seed: int = 0,
    forward_fn: ForwardFunction | None = None,
    output_fn: OutputFunction | None = None,
) -> Iterator[InputHessianOperator]:
    """The Hessians ∇²ₓ t(x[n], k) of all samples and classes as an operator, for as long as the context is open.

    The scalar that is differentiated is the ``target`` of the model's output for one class; the variable is the input.
    Nothing is summed or averaged over the batch. A module's parameters and buffers are copied when the context is
    opened (those that a callable uses must not change). Inside the context you may use and train the module: it is put
    in eval mode only while a product is computed, and restored afterwards.

    Args:
        model: an ``nn.Module``, a ``LightningModule`` or a callable that maps ``[N, *shape]`` to ``[N, C]`` or
            ``[N]``, or to an object or dict that has such a tensor as ``logits``.
        x: floating-point samples ``[N, *shape]``; D is the number of entries of one sample. For several inputs, a dict
            (``model(**x)``) or a tuple (``model(*x)``).
        classes: which outputs: an int, K ints, a tensor ``[N]`` or ``[N, K]``, ``"predicted"`` or ``"all"``.
        target: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"loss"``, ``"margin"``, or a callable
            ``(outputs [N, C], classes [N, K]) -> [N, K]``.
        dtype: float32 or float64; by default that of x. Copies of the parameters are cast to it, not the model itself.
        wrt: the variable: a key or position of ``x``, or the name of a submodule, whose output is then the variable
            (``wrt="embedding"`` for tokens). All other inputs stay fixed.
        check: whether results are compared with finite differences of values, in float64 if the model can be evaluated
            in it: five values per sample, or more near a kink or where rounding matters.
        max_memory: bytes that may be used; by default half of the free memory of the device.
        seed: of all random directions, including those of checks.
        forward_fn: ``(model, x) -> output``, instead of ``model(x)``.
        output_fn: ``output -> [N, C]``, for models that return something else.

    Yields:
        An ``InputHessianOperator``: ``H @ v``, ``H[sample, class_id]``, ``H.gauss_newton``, ``H.to_scipy(sample,
        class_id)``, ``H.diagonal()``, ``H.trace()``, ``H.to_dense()``, ``H.spectrum()``, ``H.gradient()``.

    Warns:
        UserWarning: the products of some samples are not finite, disagree with finite differences of values, or could
            not be compared with them; the message says which and why.

    Raises:
        ConfigurationError: an argument does not fit the model.

    Cost: a forward pass and a backward pass per sample and class for the first product, and the check; about 1.5
    gradients for each of the next. Memory: the graph of as many samples as fit ``max_memory``; where not all fit, or
    products with ``H`` and ``H.gauss_newton`` alternate, it is built anew for every product.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_hessian_operator
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0])
        >>> with input_hessian_operator(model, torch.full((1, 3), 2.0), classes=2) as hessian:
        ...     hessian[0, 2] @ torch.ones(3)
        tensor([0., 0., 4.])
    """
    options: OperatorOptions = {
        "dtype": dtype,
        "wrt": wrt,
        "check": check,
        "max_memory": max_memory,
        "seed": seed,
        "forward_fn": forward_fn,
        "output_fn": output_fn,
    }
    with ONE_AT_A_TIME:  # a forward that another thread measures may write to them
        buffers = dict(model.named_buffers()) if isinstance(model, nn.Module) else {}
        copies = {name: buffer.detach().clone() for name, buffer in buffers.items()}
    with operator_of_one_call(model, x, classes, target, copies, **options) as operator:
        pass  # the model is as it was; every product isolates it again
    with kept_pages(operator.device), closing(operator):
        yield operator


@contextmanager
def operator_of_one_call(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    tensors: Mapping[str, Tensor] | None = None,
    **given: Unpack[OperatorOptions],
) -> Iterator[InputHessianOperator]:
    """As ``input_hessian_operator``, for functions that need it once: the model stays isolated throughout.

    Args:
        model, x, classes, target: as there.
        tensors: in place of the model's own parameters and buffers, by name.
        given: all other arguments; those that are left out have the defaults of the fields they stand for.
    """
    if unknown := given.keys() - OperatorOptions.__annotations__.keys():
        known = ", ".join(OperatorOptions.__annotations__)
        raise TypeError(f"There is no argument {', '.join(map(repr, sorted(unknown)))} here; there are {known}.")

    def of(kind: type[Any]) -> dict[str, Any]:
        return {each.name: value for each in fields(kind) if (value := given.get(each.name)) is not None}

    options = Options(**of(Options))
    network = ModelFunction(model, tensors=tensors, **of(ModelFunction))
    dtype = usable_dtype(network, x, given.get("dtype"))
    with prepare(network, x, classes, target, dtype=dtype, max_memory=options.max_memory) as prepared:
        access = ModelAccess(network, prepared)
        yield InputHessianOperator(access, options)
        access.is_isolated = False


def _reported(what: str, found: CheckedDerivatives) -> CheckedDerivatives:
    """Warns of what is wrong with derivatives, which are ``what``."""
    if (warning := found.warning(what)) is not None:
        warn(warning)
    return found


def _per_problem(v: Tensor, batch: TargetBatch) -> Tensor:
    num_samples, _, num_inputs = batch.shape
    if v.is_complex():
        raise ConfigurationError(
            f"v has dtype {v.dtype}, and a Hessian is multiplied with real vectors: give v.real and v.imag one by one."
        )
    v = v.to(batch.x)
    if not v.isfinite().all():
        dtype = str(v.dtype).removeprefix("torch.")
        raise ConfigurationError(f"v must hold finite numbers; some of its entries are NaN or infinite in {dtype}.")
    if v.shape == (num_inputs,):
        v = v.expand(batch.shape)
    elif v.shape in ((num_samples, num_inputs), batch.x.shape):
        v = v.reshape(num_samples, 1, num_inputs).expand(batch.shape)
    if v.shape != batch.shape:
        raise ConfigurationError(
            f"v has shape {tuple(v.shape)}; it must be [D], [N, D], [N, K, D] or the shape of x, with (N, K, D) = "
            f"{batch.shape}."
        )
    return v
