"""Input-Hessians as linear operators, for any algorithm that asks for matrix-vector products."""

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
    """What every function on input-Hessians takes beside model, samples, classes and target.

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
    """The input-Hessians of N samples and K classes, ``[N, K, D, D]``; made by ``input_hessian_operator``.

    ``@``, ``matvec``, ``trace`` and ``diagonal`` are compared with differences of values once, before the first
    product, along a random direction; ``gradient``, ``hvp``, ``to_dense`` and ``spectrum`` as ``input_gradient``,
    ``input_hvp``, ``input_hessian`` and ``input_spectrum`` say.
    """

    def __init__(self, access: ModelAccess, options: Options) -> None:
        self._batch = access.prepared.batch
        self._access = access
        self._memory = access.prepared.memory
        self._options = replace(options, max_memory=self._memory)
        super().__init__(self._blocks_of(HessianOperator), self._batch.classes, access, options.seed)

    @cached_property
    def gauss_newton(self) -> BatchedHessian:
        """The Gauss–Newton term JᵀAJ alone: the Hessian without the curvature of the network itself.

        J ``[C, D]`` is the Jacobian of the outputs, A ``[C, C]`` the Hessian of the target with respect to them. It is
        all of the Hessian of a piecewise linear network, and zero for ``"logit"``. It is not compared with values.
        """
        return BatchedHessian(self._blocks_of(GaussNewtonOperator), self.classes, self._access, self._seed)

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
        with self._without_graphs() as prepared:
            found = functions.gradient(self._batch, self._options, prepared.forward)
        return _reported("gradient", found).numbers

    def hvp(self, v: Tensor) -> Tensor:
        """Products ``[N, K, D]``, each compared with values; see ``input_hvp``."""
        v = _per_problem(torch.as_tensor(v), self._batch)
        with self._without_graphs() as prepared:
            found = functions.hvp(self._batch, v, self._options, prepared.forward)
        return _reported("HVP", found).numbers

    def to_dense(self, *, chunk_size: ChunkSize = "auto", max_seconds: float | None = None) -> Tensor:
        """The matrices ``[N, K, D, D]``; see ``input_hessian``."""
        options = replace(self._options, chunk_size=chunk_size, max_seconds=max_seconds)
        with self._without_graphs() as prepared:
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
        """Eigenvalues, with residuals and all that follows from them; see ``input_spectrum``."""
        options = replace(
            self._options,
            method=method,
            num_eigenvalues=num_eigenvalues,
            block_size=block_size,
            density_vectors=density_vectors,
            chunk_size=chunk_size,
            max_seconds=max_seconds,
        )
        with self._without_graphs() as prepared:
            found = functions.spectrum(self._batch, prepared.target_name, options, prepared.forward, prepared.meter)
        if not found.valid.all():
            warn(about_invalid("spectrum", found.valid, found.diagnosis.message))
        return found

    def __getitem__(self, pair: tuple[int, int]) -> SampleHessian:
        """As for every ``BatchedHessian``."""
        _ = self.valid
        return super().__getitem__(pair)

    def close(self) -> None:
        """Frees the graphs; nothing can be computed any more."""
        self._access.is_closed = True
        self._free()

    def _free(self) -> None:
        self._blocks.free()
        if "gauss_newton" in vars(self):
            self.gauss_newton._blocks.free()

    @contextmanager
    def _without_graphs(self) -> Iterator[PreparedModel]:
        """The isolation, for work that counts on all of the memory; the next product builds its graph anew."""
        with self._access.isolated() as prepared:
            self._free()
            yield prepared

    def _blocks_of(self, kind: type[BatchOperator]) -> ProblemBlocks:
        costs = ModelCosts(self._batch, self._memory, self._access.prepared.forward)

        def rows_at_once() -> int:
            of_term = kind is GaussNewtonOperator
            per_row = costs.gauss_newton_matvec_bytes if of_term else costs.split_matvec_bytes
            return max(1, self._memory // per_row)  # all that fit: their graph is kept, and need not be built again

        return ProblemBlocks(kind, self._batch, rows_at_once)

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

    Differentiated is the scalar ``target`` of the model's output for one class, with respect to the input; nothing is
    summed or averaged over the batch. A module's parameters and buffers are copied when the context is opened (those
    behind a callable must not change). It may be used and trained inside of the context: only while a product is
    computed is it in eval mode, and put back afterwards.

    Args:
        model: an ``nn.Module``, a ``LightningModule`` or a callable, from ``[N, *shape]`` to ``[N, C]`` or ``[N]``,
            or to an object or dict that has those as ``logits``.
        x: floating-point samples ``[N, *shape]``; D is the number of entries of one. For several inputs a dict
            (``model(**x)``) or a tuple (``model(*x)``).
        classes: which outputs: an int, K ints, a tensor ``[N]`` or ``[N, K]``, ``"predicted"`` or ``"all"``.
        target: ``"logit"``, ``"log_prob"``, ``"prob"``, ``"loss"``, ``"margin"``, or a callable
            ``(outputs [N, C], classes [N, K]) -> [N, K]``.
        dtype: float32 or float64; by default that of x. Parameters are cast to it, not the model's own.
        wrt: what is differentiated: a key or position of ``x``, or the name of a submodule, whose output then
            is the variable (``wrt="embedding"`` for tokens); all other inputs stay fixed.
        check: whether results are compared with differences of values, in float64 where the model can be evaluated in
            it: five values per sample, more where a kink or rounding is near.
        max_memory: bytes that may be used; by default half of what is free on the device.
        seed: of all random directions, those of checks too.
        forward_fn: ``(model, x) -> output``, in place of ``model(x)``.
        output_fn: ``output -> [N, C]``, for models that return something else.

    Yields:
        An ``InputHessianOperator``: ``H @ v``, ``H[sample, class_id]``, ``H.gauss_newton``, ``H.to_scipy(sample,
        class_id)``, ``H.diagonal()``, ``H.trace()``, ``H.to_dense()``, ``H.spectrum()``, ``H.gradient()``.

    Warns:
        UserWarning: the products of some samples are not finite, contradicted by values, or could not be compared with
            them; the message says which and why.

    Raises:
        ConfigurationError: an argument does not fit the model.

    Cost: a forward pass and a backward pass per sample and class for the first product, and the check; about 1.5
    gradients for each of the next. Memory: the graph of as many samples as fit ``max_memory``; where not all fit, it is
    built anew for every product.

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
