"""Input gradients, HVPs, Hessians and spectra of any model, without a Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lightning_hessian.curvature.options import ChunkSize, MethodChoice
from lightning_hessian.curvature.spectrum import Spectrum
from lightning_hessian.model.arguments import Classes, Model, Target
from lightning_hessian.model.function import Inputs
from lightning_hessian.operator import OperatorOptions, operator_of_one_call

if TYPE_CHECKING:
    from typing_extensions import Unpack


def input_gradient(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    **options: Unpack[OperatorOptions],
) -> Tensor:
    """Gradient of each sample's target with respect to that sample: ∇ₓ t(x[n], k).

    The scalar that is differentiated is the ``target`` of the model's output for one class; the variable is the input.
    Nothing is summed or averaged over the batch.

    Args:
        model, x, classes, target: as for ``input_hessian_operator``.
        options: dtype, wrt, check, max_memory, seed, forward_fn and output_fn, as for ``input_hessian_operator``.

    Returns:
        ``[N, K, D]``, in target units per input unit.

    Warns:
        UserWarning: the gradients of some samples are not finite (NaN), disagree with finite differences of values
            (returned as computed), or could not be compared with them; the message says which and why.

    Raises:
        ConfigurationError: an argument does not fit the model; the message says what does.
        MeasurementError: none of the gradients is finite.

    Cost: one forward and K backward passes, and the check. Memory: their activations.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_gradient
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> input_gradient(model, torch.full((1, 4), 2.0), classes=2)
        tensor([[[0., 0., 8., 0.]]])
    """
    with operator_of_one_call(model, x, classes, target, **options) as hessian:
        return hessian.gradient()


def input_hvp(
    model: Model,
    x: Inputs,
    v: Tensor,
    classes: Classes,
    target: Target = "logit",
    **options: Unpack[OperatorOptions],
) -> Tensor:
    """Hessian-vector product (HVP) of each sample's target: ∇²ₓ t(x[n], k) · v.

    Args:
        model, x, classes, target: as for ``input_hessian_operator``.
        v: one vector for all samples and classes ``[D]``, one per sample (``[N, D]`` or the shape of x), or one per
            sample and class ``[N, K, D]``.
        options: dtype, wrt, check, max_memory, seed, forward_fn and output_fn, as for ``input_hessian_operator``.

    Returns:
        ``[N, K, D]``.

    Warns:
        UserWarning: some products are not finite, disagree with finite differences of values (returned as computed), or
            could not be compared with them; the message says which and why. If values or gradients of a sample are not
            finite, its products are NaN.

    Raises:
        ConfigurationError: an argument does not fit the model, v does not fit x, or v is not finite and real.
        MeasurementError: none of the products is finite, or an operation has no second derivative.

    Cost: a forward pass, two backward passes per class (Pearlmutter 1994, by double backward), and the check: five
    values along v per sample, or per sample and class if each class has its own vector. Memory: the graph of as
    many samples at a time as fit in ``max_memory``.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_hvp
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0, 3.0])
        >>> input_hvp(model, torch.full((1, 4), 2.0), torch.ones(4), classes=2)
        tensor([[[0., 0., 4., 0.]]])
    """
    with operator_of_one_call(model, x, classes, target, **options) as hessian:
        return hessian.hvp(v)


def input_hessian(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    *,
    chunk_size: ChunkSize = "auto",
    max_seconds: float | None = None,
    **options: Unpack[OperatorOptions],
) -> Tensor:
    """Whole Hessian of each sample's target with respect to that sample: H[n, k] = ∇²ₓ t(x[n], k).

    Computed in a few large blocks of columns: forward over reverse, ``vmap``-batched and shared by all classes, or
    reverse over reverse if that is faster, or if forward mode is missing or wrong for the model. For a network that is
    piecewise linear in its input, computed as JᵀAJ from the gradients of its C outputs. A target that does not depend
    on x, or only linearly, gives exact zeros.

    Args:
        model, x, classes, target: as for ``input_hessian_operator``.
        chunk_size: columns computed at once; by default as many as memory allows and speed gains from.
        max_seconds: the time limit. If the first blocks show that it will be exceeded, the error says how long the
            Hessians are expected to take, and what would fit.
        options: dtype, wrt, check, max_memory, seed, forward_fn and output_fn, as for ``input_hessian_operator``.

    Returns:
        ``[N, K, D, D]``, symmetric, flattened from the input's shape in row-major order.

    Warns:
        UserWarning: the Hessians of some samples are not finite (NaN), disagree with finite differences of values
            (returned as computed), or could not be compared with them; the message says which and why.

    Raises:
        ConfigurationError: an argument does not fit the model, or the result does not fit ``max_memory``.
        MeasurementError: no sample has finite values, gradients and Hessians, or they would exceed ``max_seconds``.

    Cost: D columns, each about (1 + K)/2 to K gradients of the batch; memory N·K·D² numbers.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_hessian
        >>> def model(x): return x * x * torch.tensor([0.0, 1.0, 2.0])
        >>> input_hessian(model, torch.full((1, 3), 2.0), classes=2)
        tensor([[[[0., 0., 0.],
                  [0., 0., 0.],
                  [0., 0., 4.]]]])
    """
    with operator_of_one_call(model, x, classes, target, **options) as hessian:
        return hessian.to_dense(chunk_size=chunk_size, max_seconds=max_seconds)


def input_spectrum(
    model: Model,
    x: Inputs,
    classes: Classes,
    target: Target = "logit",
    *,
    method: MethodChoice = "auto",
    num_eigenvalues: int = 10,
    block_size: int = 1,
    density_vectors: int = 0,
    chunk_size: ChunkSize = "auto",
    max_seconds: float | None = None,
    **options: Unpack[OperatorOptions],
) -> Spectrum:
    """Eigenvalues of each sample's input Hessian, with residuals and all derived quantities.

    Args:
        model, x, classes, target: as for ``input_hessian_operator``.
        chunk_size: as for ``input_hessian``.
        max_seconds: the time limit. To keep it, ``"lanczos"`` replaces methods for complete spectra, unless you asked
            for one of them. Then random vectors are dropped (standard errors grow), and last Lanczos steps (residuals
            grow, and eigenvalues that have not converged are marked). What is dropped depends on the machine; the
            diagnosis lists it. By default there is no limit, and nothing depends on a clock.
        method: ``"dense"``: all D eigenvalues, from the whole matrix. ``"low_rank"``: the complete spectrum of a
            piecewise linear network, from C gradients. ``"lanczos"``: the ends of the spectrum, with residuals.
            ``"auto"``: the cheapest of these that is exact or has an error estimate.
        num_eigenvalues: how many eigenvectors are returned, those of largest |λ|; with ``"lanczos"``, how many
            eigenvalues are found, half of them (at least one) at each end. ``"low_rank"`` returns all if there are no
            more than 64.
        block_size: the number of starting vectors of ``"lanczos"``. One vector cannot tell how often an eigenvalue
            repeats: copies are missing even though every listed eigenvalue has converged. With b vectors, up to b
            copies are found, at the price of more HVPs. The other methods find every copy.
        density_vectors: with ``"lanczos"``, the number of random starting vectors from which the density of
            eigenvalues is estimated, with a standard error; at least 2, or 0 for none. The other methods give it
            exactly and need none.
        options: dtype, wrt, check, max_memory, seed, forward_fn and output_fn, as for ``input_hessian_operator``.

    Returns:
        A ``Spectrum``; its ``diagnosis`` explains, for instance, why a Hessian is zero.

    Warns:
        UserWarning: the spectra of some samples cannot be trusted; the message says which and why. ``valid`` is False
            there, and their numbers are as computed. If a sample could not be compared with values, the diagnosis says
            so.

    Raises:
        ConfigurationError: an argument does not fit the model.
        MeasurementError: none of the Hessians is finite, one sample's matrices do not fit in ``max_memory``, or
            ``method="dense"`` would exceed ``max_seconds``.

    Cost: ``dense`` as ``input_hessian``, plus O(D³) per sample and class for the eigenvalues; ``low_rank`` C gradients;
    ``lanczos`` four to ten HVPs per eigenvalue, twelve for trace and norms, C gradients for the norms of the two terms,
    40 HVPs for each of the ``density_vectors``, and about six for the checks. As many samples are processed at a time
    as fit in ``max_memory``.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_spectrum
        >>> spectrum = input_spectrum(torch.nn.Linear(3, 2), torch.zeros(1, 3), classes=1)
        >>> spectrum.diagnosis.kind
        'linear'
    """
    with operator_of_one_call(model, x, classes, target, **options) as hessian:
        return hessian.spectrum(
            method=method,
            num_eigenvalues=num_eigenvalues,
            block_size=block_size,
            density_vectors=density_vectors,
            chunk_size=chunk_size,
            max_seconds=max_seconds,
        )
