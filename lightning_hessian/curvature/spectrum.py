"""The result of a measurement: eigenvalues, how far they can be trusted, and what is derived from them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian.curvature.algorithms.quadrature import Density, exact_density
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.meter import Cost
from lightning_hessian.curvature.operators.autodiff import AutodiffMode
from lightning_hessian.curvature.options import MethodName

ESTIMATED = ("trace", "frobenius_norm", "gauss_newton_norm", "functional_norm", "diagonal")  # each has an error


@dataclass(frozen=True)
class Decomposition:
    """Eigenvalues of the Hessians of N samples and K classes, and what a method finds together with them.

    Attributes:
        eigenvalues: ``[N, K, M]``, descending and algebraic (negative ones last).
        eigenvectors: ``[N, K, V, D]``, unit vectors of the V eigenvalues of largest magnitude, largest first.
        vector_index: ``[N, K, V]``, the positions of those V in ``eigenvalues``.
        residuals: ``[N, K, M]``, ‖H v − λ v‖ of every pair: an eigenvalue of H lies within this of λ.
        converged: ``[N, K, M]``, whether that residual is small against the norm of H or against the eigenvalue itself.
        complete: True if the D − M eigenvalues not listed are exactly zero.
        density: how eigenvalues are spread, as nodes and weights ``[N, K, S, m]``. Of a complete spectrum exact, with
            S = 1, the unlisted zeros included; of an incomplete one an estimate from the S starting vectors asked for
            with ``density_vectors``, or None where none were.
        trace: ``[N, K]``, Σ λ.
        frobenius_norm: ``[N, K]``, √Σ λ².
        gauss_newton_norm: ``[N, K]``, Frobenius norm of the Gauss-Newton term JᵀAJ.
        functional_norm: ``[N, K]``, Frobenius norm of the functional term, the rest.
        diagonal: ``[N, K, D]``, the second derivatives along single input entries.
        trace_error, frobenius_norm_error, gauss_newton_norm_error, functional_norm_error, diagonal_error: their
            standard errors, in the same shapes; 0 where they are exact.
        gradient_curvature: ``[N, K]``, gᵀHg / gᵀg, the curvature along the gradient; NaN where g = 0.
        asymmetry: ``[N, K]``, ‖H − Hᵀ‖ / ‖H‖ in the Frobenius norm before H was made symmetric; for ``lanczos``
            an estimate from all pairs of ten random vectors.
    """

    eigenvalues: Tensor
    eigenvectors: Tensor
    vector_index: Tensor
    residuals: Tensor
    converged: Tensor
    complete: bool
    density: Density | None
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


def eigenpairs(matrices: Tensor, num_vectors: int) -> tuple[dict[str, Tensor], Tensor]:
    """Eigenvalues, residuals and positions of symmetric matrices as in ``Decomposition``; eigenvectors as columns."""
    size = matrices.shape[-1]
    eigenvalues, vectors = torch.linalg.eigh(matrices)
    residuals = (matrices @ vectors - vectors * eigenvalues.unsqueeze(-2)).norm(dim=-2)
    eigenvalues, residuals, vectors = eigenvalues.flip(-1), residuals.flip(-1), vectors.flip(-1)
    rounding = torch.finfo(matrices.dtype).eps * (10 + size) * eigenvalues.abs().amax(-1, keepdim=True)
    index = eigenvalues.abs().topk(min(num_vectors, size), dim=-1).indices
    pairs = {"eigenvalues": eigenvalues, "residuals": residuals, "converged": residuals <= rounding}
    return {**pairs, "vector_index": index}, vectors


def exact_decomposition(**quantities: Tensor) -> Decomposition:
    """The decomposition of a complete spectrum: nothing is estimated, every error is zero."""
    errors = {f"{name}_error": torch.zeros_like(quantities[name]) for name in ESTIMATED}
    density = exact_density(quantities["eigenvalues"], quantities["diagonal"].shape[-1])
    return Decomposition(**quantities, **errors, density=density, complete=True)


def zero_decomposition(gradient: Tensor, num_eigenvalues: int, num_vectors: int) -> Decomposition:
    """That of zero Hessians, without forming them; the eigenvectors are unit vectors, which are arbitrary."""
    zeros = gradient.new_zeros(gradient.shape[:2])
    num_vectors = min(num_vectors, num_eigenvalues)
    listed = zeros.unsqueeze(-1).repeat(1, 1, num_eigenvalues)
    basis = torch.eye(num_vectors, gradient.shape[-1], dtype=gradient.dtype, device=gradient.device)
    index = torch.arange(num_vectors, device=gradient.device)
    return exact_decomposition(
        eigenvalues=listed,
        eigenvectors=basis.expand(*zeros.shape, -1, -1).clone(),
        vector_index=index.expand(*zeros.shape, -1).clone(),
        residuals=listed.clone(),
        converged=torch.ones_like(listed, dtype=torch.bool),
        trace=zeros,
        frobenius_norm=zeros.clone(),
        gauss_newton_norm=zeros.clone(),
        functional_norm=zeros.clone(),
        diagonal=torch.zeros_like(gradient),
        gradient_curvature=zeros.where(gradient.norm(dim=-1) > 0, torch.nan),
        asymmetry=zeros.clone(),
    )


@dataclass(frozen=True, repr=False)
class Spectrum(Decomposition):
    """Eigenvalues of the input-Hessians of N samples and K classes, with what follows from them.

    Units: one eigenvalue is target per squared input unit; a gradient is target per input unit.

    Attributes: those of ``Decomposition``, and

        gradient: ``[N, K, D]``.
        method: how the eigenvalues were found.
        reason: why that method was chosen.
        autodiff_mode: how the derivatives were taken.
        target: name of the differentiated scalar.
        finite_difference_error: ``[N, K]``, |wᵀHw − Δ²t/h²| / max |λ|: how far H is from a central difference of
            values in float64 along one direction w, at the sample itself; NaN where it was not checked.
        valid: ``[N, K]``, False where H is wrong (its numbers are those computed) or not finite (they are NaN); the
            diagnosis says why.
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

    gradient: Tensor
    method: MethodName
    reason: str
    autodiff_mode: AutodiffMode
    target: str
    finite_difference_error: Tensor
    valid: Tensor
    diagnosis: Diagnosis
    cost: Cost

    def __repr__(self) -> str:
        num_samples, num_classes, num_listed = self.eigenvalues.shape
        eigenvalues = self.eigenvalues[self.eigenvalues.isfinite()]
        trace = self.trace[self.trace.isfinite()]
        numbers = "no finite numbers"
        if eigenvalues.numel() and trace.numel():
            ends = f"{float(eigenvalues.min()):.3g} to {float(eigenvalues.max()):.3g}"
            numbers = f"λ {ends}, mean trace {float(trace.mean()):.3g}"
        return (
            f"Spectrum({self.target}, {self.method}, {self.diagnosis.kind}\n"
            f"  samples × classes: {num_samples} × {num_classes}, D = {self.gradient.shape[-1]}\n"
            f"  {num_listed} eigenvalues each, {numbers}\n"
            f"  valid {int(self.valid.sum())} of {self.valid.numel()}, "
            f"eigenvalues converged {int(self.converged.sum())} of {self.converged.numel()})"
        )

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
        """‖JᵀAJ‖ / (‖JᵀAJ‖ + ‖functional term‖), ``[N, K]``; NaN for a zero Hessian.

        A falling ``log_prob`` curvature with a share near 1 is often only a softmax that saturates.
        """
        return self.gauss_newton_norm / (self.gauss_newton_norm + self.functional_norm)

    @property
    def gauss_newton_share_error(self) -> Tensor:
        """Standard error of ``gauss_newton_share``, to first order an upper bound, ``[N, K]``; 0 where it is exact."""
        a, b = self.gauss_newton_norm, self.functional_norm
        return (b * self.gauss_newton_norm_error + a * self.functional_norm_error) / (a + b) ** 2

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
        """|cos| between the gradient and the eigenvector of largest |λ|, ``[N, K]``; NaN where the gradient is 0."""
        top = self.eigenvectors[:, :, 0]
        return (top * self.gradient).sum(-1).abs() / self.gradient_norm

    @property
    def _zeros_left_out(self) -> bool:
        return self.complete and self.eigenvalues.shape[-1] < self.gradient.shape[-1]
