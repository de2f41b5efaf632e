"""The result of a measurement: eigenvalues, how far they can be trusted, and what is derived from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.quadrature import Density
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.meter import Cost
from lightning_hessian.curvature.operators.autodiff import AutodiffMode

MethodName = Literal["dense", "low_rank", "lanczos"]


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues of the input-Hessians of N samples and K classes, with what follows from them.

    Units: one eigenvalue is target per squared input unit; a gradient is target per input unit.

    Attributes:
        eigenvalues: ``[N, K, M]``, descending and algebraic (negative ones last).
        eigenvectors: ``[N, K, V, D]``, unit vectors of the V eigenvalues of largest magnitude, largest first,
            or None where none were computed.
        vector_index: ``[N, K, V]``, the positions of those V in ``eigenvalues``.
        residuals: ``[N, K, M]``, ‖H v − λ v‖ of every pair: an eigenvalue of H lies within this of λ.
        converged: ``[N, K, M]``, whether that residual is small against the norm of H.
        complete: True if the D − M eigenvalues not listed are exactly zero.
        density: how eigenvalues are spread, as nodes and weights ``[N, K, S, m]``. Of a complete spectrum exact, with
            S = 1 and the zeros left out of the list counted; of an incomplete one an estimate from the S starting
            vectors asked for with ``density_vectors``, or None where none were.
        gradient: ``[N, K, D]``.
        trace: ``[N, K]``, Σ λ.
        trace_error: ``[N, K]``, standard error of the trace; 0 where it is exact.
        frobenius_norm: ``[N, K]``, √Σ λ².
        frobenius_norm_error: ``[N, K]``, its standard error; 0 where it is exact.
        gauss_newton_norm: ``[N, K]``, Frobenius norm of the Gauss-Newton term JᵀAJ.
        gauss_newton_norm_error: its standard error; 0 where it is exact.
        functional_norm: ``[N, K]``, Frobenius norm of the functional term, the rest.
        functional_norm_error: its standard error; 0 where it is exact.
        diagonal: ``[N, K, D]``, the second derivatives along single input entries.
        diagonal_error: ``[N, K, D]``, its standard error; 0 where it is exact.
        gradient_curvature: ``[N, K]``, gᵀHg / gᵀg, the curvature along the gradient; NaN where g = 0.
        asymmetry: ``[N, K]``, ‖H − Hᵀ‖ / ‖H‖ in the Frobenius norm before H was symmetrised; for ``lanczos``
            the same along two random directions.
        method: how the eigenvalues were found.
        reason: why that method was chosen.
        autodiff_mode: how the derivatives were taken.
        target: name of the differentiated scalar.
        diagnosis: why the Hessian is what it is.
        cost: what it took.

    Example:
        >>> import torch
        >>> from lightning_hessian import input_spectrum
        >>> def quadratic(x): return 0.5 * (x * x * torch.tensor([3.0, -1.0])).sum(dim=1)
        >>> spectrum = input_spectrum(quadratic, torch.tensor([[1.0, 1.0]]), classes=0)
        >>> spectrum.eigenvalues
        tensor([[[ 3., -1.]]])
        >>> spectrum.trace
        tensor([[2.]])
    """

    eigenvalues: Tensor
    eigenvectors: Tensor | None
    vector_index: Tensor | None
    residuals: Tensor
    converged: Tensor
    complete: bool
    density: Density | None
    gradient: Tensor
    trace: Tensor
    trace_error: Tensor
    frobenius_norm: Tensor
    frobenius_norm_error: Tensor
    gauss_newton_norm: Tensor
    gauss_newton_norm_error: Tensor
    functional_norm: Tensor
    functional_norm_error: Tensor
    diagonal: Tensor
    diagonal_error: Tensor
    gradient_curvature: Tensor
    asymmetry: Tensor
    method: MethodName
    reason: str
    autodiff_mode: AutodiffMode
    target: str
    diagnosis: Diagnosis
    cost: Cost

    @property
    def lambda_max(self) -> Tensor:
        """Largest algebraic eigenvalue ``[N, K]``; never below zero if zeros are left out of the list."""
        largest = self.eigenvalues[..., 0]
        return largest.clamp_min(0) if self._zeros_left_out else largest

    @property
    def lambda_min(self) -> Tensor:
        """Smallest algebraic eigenvalue ``[N, K]``; never above zero if zeros are left out of the list."""
        smallest = self.eigenvalues[..., -1]
        return smallest.clamp_max(0) if self._zeros_left_out else smallest

    @property
    def spectral_norm(self) -> Tensor:
        """Largest magnitude of an eigenvalue, max |λ|, ``[N, K]``."""
        return self.eigenvalues.abs().amax(dim=-1)

    @property
    def negative_share(self) -> Tensor:
        """Σ_{λ<0} |λ| / Σ |λ|, ``[N, K]``; NaN for a zero Hessian and where only the ends of a spectrum are known."""
        if not self.complete:
            return torch.full_like(self.trace, torch.nan)
        magnitudes = self.eigenvalues.abs()
        return magnitudes.where(self.eigenvalues < 0, 0).sum(-1) / magnitudes.sum(-1)

    @property
    def effective_rank(self) -> Tensor:
        """(Σ |λ|)² / Σ λ², ``[N, K]``: how many directions share the curvature; NaN as for ``negative_share``."""
        if not self.complete:
            return torch.full_like(self.trace, torch.nan)
        return self.eigenvalues.abs().sum(-1) ** 2 / self.eigenvalues.square().sum(-1)

    @property
    def gauss_newton_share(self) -> Tensor:
        """‖JᵀAJ‖ / (‖JᵀAJ‖ + ‖rest‖), ``[N, K]``: how much of the curvature is the head's; NaN for a zero Hessian.

        A falling ``log_prob`` curvature with a share near 1 is often only a head that saturates.
        """
        return self.gauss_newton_norm / (self.gauss_newton_norm + self.functional_norm)

    @property
    def gauss_newton_share_error(self) -> Tensor:
        """Standard error of ``gauss_newton_share``, to first order and at most, ``[N, K]``; 0 where it is exact."""
        head, network = self.gauss_newton_norm, self.functional_norm
        return (network * self.gauss_newton_norm_error + head * self.functional_norm_error) / (head + network) ** 2

    @property
    def gradient_norm(self) -> Tensor:
        """‖g‖, ``[N, K]``."""
        return self.gradient.norm(dim=-1)

    @property
    def normalized_curvature(self) -> Tensor:
        """Max |λ| / ‖g‖, ``[N, K]``, per input unit; NaN where both are zero."""
        return self.spectral_norm / self.gradient_norm

    @property
    def linear_radius(self) -> Tensor:
        """2 ‖g‖ / max |λ|, ``[N, K]``, in input units.

        The distance from the sample at which the second-order term ½ λ r² is as large as the first, ‖g‖ r.
        Infinite for a zero Hessian.
        """
        return 2 * self.gradient_norm / self.spectral_norm

    @property
    def gradient_alignment(self) -> Tensor:
        """|cos| between the gradient and the eigenvector of largest |λ|, ``[N, K]``; NaN without one."""
        if self.eigenvectors is None:
            return torch.full_like(self.trace, torch.nan)
        top = self.eigenvectors[:, :, 0]
        return (top * self.gradient).sum(-1).abs() / self.gradient_norm

    @property
    def _zeros_left_out(self) -> bool:
        return self.complete and self.eigenvalues.shape[-1] < self.gradient.shape[-1]
