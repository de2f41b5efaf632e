"""The right-hand sides of the metrics' pictures: what the last value of each metric says of one digit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from gallery_pictures import show
from matplotlib.axes import Axes
from torch.func import hessian, jacrev

from lightning_hessian import Record
from lightning_hessian.render.maps import short

DIGIT = 14  # the held-out digit on the right: a 1, of which no term is tiny
RED, BLUE, GRAY, DARK = "#b2182b", "#2166ac", "#bdbdbd", "#404040"
TERMS = ("JᵀAJ", "functional term")
Array = np.ndarray


@dataclass(frozen=True)
class Run:
    """Both monitors' records, and the network after the last step in float64."""

    logit: list[Record]
    prob: list[Record]
    net: torch.nn.Module

    @property
    def last(self) -> Record:
        """That of the logit after training."""
        return self.logit[-1]

    @property
    def x(self) -> torch.Tensor:
        """The digit."""
        return torch.tensor(self.last.x[DIGIT], dtype=torch.float64)

    def value(self, metric: str, target: str = "logit") -> float:
        """That of the digit at the last step."""
        return float(getattr(getattr(self, target)[-1], metric)[DIGIT, 0])

    def along(self, direction: Array, distances: Array) -> Array:
        """The label's logit at these distances from the digit."""
        x = self.x + torch.tensor(distances)[:, None] * torch.tensor(direction, dtype=torch.float64)
        with torch.no_grad():
            return self.net(x)[:, int(self.last.labels[DIGIT])].numpy()

    @property
    def unit_gradient(self) -> Array:
        """The direction of the logit's gradient at the digit."""
        gradient = self.last.gradient[DIGIT, 0].astype(np.float64)
        return gradient / np.linalg.norm(gradient)

    def vectors(self, measurement: int = -1) -> Array:
        """The digit's eigenvectors, largest |λ| first."""
        return self.logit[measurement].eigenvectors[DIGIT, 0]


def spectrum(run: Run, axes: Axes, says: str, places: slice | int = slice(None)) -> None:
    """All eigenvalues as bars, those at ``places`` colored by their signs."""
    values = run.last.eigenvalues[DIGIT, 0]
    colors = np.full(len(values), GRAY)
    colors[places] = np.where(values < 0, BLUE, RED)[places]
    bars(axes, values, colors, "λ, logit per input unit²", says)


def one_eigenvalue(run: Run, axes: Axes, metric: str, place: Callable[[Array], np.intp]) -> None:
    """The eigenvalue that a metric is."""
    spectrum(run, axes, f"one digit: {short(run.value(metric))}", int(place(run.last.eigenvalues[DIGIT, 0])))


def bars(axes: Axes, values: Array, colors: Array | str, label: str, says: str) -> None:
    """One bar for each eigenvalue, in descending order."""
    axes.bar(np.arange(1, len(values) + 1), values, width=0.85, color=colors)
    axes.axhline(0, color=DARK, lw=0.6)
    axes.set(xlabel="number of the eigenvalue", ylabel=label)
    axes.set_title(says, fontsize=10)


def by_sign(run: Run, axes: Axes, of: Callable[[float, float], str]) -> None:
    """All eigenvalues, and a sentence made of the sums of positive and of negative ones."""
    values = run.last.eigenvalues[DIGIT, 0]
    says = of(float(values[values > 0].sum()), float(values[values < 0].sum()))
    spectrum(run, axes, says)


def squares(run: Run, axes: Axes) -> None:
    """The squares of all eigenvalues."""
    values = run.last.eigenvalues[DIGIT, 0] ** 2
    bars(axes, values, DARK, "λ²", f"one digit: root of the sum {short(run.value('frobenius_norm'))}")


def rank(run: Run, axes: Axes) -> None:
    """All magnitudes, as many dark as the effective rank."""
    values = np.sort(np.abs(run.last.eigenvalues[DIGIT, 0]))[::-1]
    found = run.value("effective_rank")
    bars(axes, values, np.where(np.arange(64) < found, DARK, GRAY), "|λ|", f"one digit: {short(found)} of 64")
    axes.set_xlabel("rank by |λ|")


def along_gradient(run: Run, axes: Axes, parabola: bool) -> None:
    """The logit along the gradient, with its tangent and, where asked for, the parabola."""
    distances = np.linspace(-1, 1, 101)
    values, slope = run.along(run.unit_gradient, distances), run.value("gradient_norm")
    tangent = values[50] + slope * distances
    axes.plot(distances, values, color=DARK, label="logit")
    axes.plot(distances, tangent, "--", color=RED, label=f"slope {short(slope)}")
    if parabola:
        bend = run.value("gradient_curvature")
        axes.plot(distances, tangent + bend * distances**2 / 2, ":", lw=2, color=BLUE, label=f"curvature {short(bend)}")
    axes.plot(0, values[50], "o", color=DARK, ms=5)
    axes.set(xlabel="input units along the gradient", ylabel="logit of the label", title="one digit")
    axes.legend(fontsize=8)


def normalized(run: Run, axes: Axes) -> None:
    """The logit along the top eigenvector, and three times the logit."""
    distances = np.linspace(-1, 1, 101)
    values, ratio = run.along(run.vectors()[0], distances), run.value("normalized_curvature")
    for factor, style in ((1, "-"), (3, "--")):
        strongest, slope = (factor * run.value(name) for name in ("spectral_norm", "gradient_norm"))
        label = f"× {factor}: {short(strongest)} / {short(slope)} = {short(ratio)}"
        axes.plot(distances, factor * (values - values[50]), style, color=DARK if factor == 1 else RED, label=label)
    axes.set(xlabel="input units along the top eigenvector", ylabel="change of the logit", title="one digit")
    axes.legend(fontsize=8, title="max |λ| / ‖g‖ of the logit", title_fontsize=8)


def radius(run: Run, axes: Axes) -> None:
    """Both orders, and what the logit really does besides its tangent along the top eigenvector."""
    found, slope, strongest = (run.value(name) for name in ("linear_radius", "gradient_norm", "spectral_norm"))
    distances = np.linspace(0, 1.6 * found, 101)
    v = run.vectors()[0].astype(np.float64)
    values = run.along(v, distances)
    beside = np.abs(values - values[0] - distances * float(v @ run.last.gradient[DIGIT, 0]))
    axes.plot(distances, slope * distances, color=DARK, label="first order: ‖g‖ r")
    axes.plot(distances, strongest * distances**2 / 2, color=RED, label="second order: ½ max |λ| r²")
    axes.plot(distances, beside, ":", lw=2, color=BLUE, label="logit minus tangent, along v")
    axes.axvline(found, color=GRAY, lw=1)
    axes.set_title(f"one digit: r = {short(found)}", fontsize=10)
    axes.set(xlabel="distance r from the digit, input units", ylabel="change of the logit")
    axes.set_ylim(0, 1.5 * strongest * distances[-1] ** 2 / 2)  # room for the legend
    axes.legend(fontsize=8, loc="upper left")


def show_small(axes: Axes, values: Array, title: str) -> None:
    """A map on its own scale."""
    show(axes, values, title)
    axes.title.set_fontsize(9)


def show_directions(axes: list[Axes], directions: list[Array], titles: list[str], cosine: float) -> None:
    """Two unit vectors of 8×8 pixels on one scale."""
    limit = max(float(np.abs(each).max()) for each in directions)
    for ax, each, title in zip(axes, directions, titles, strict=True):
        show_small(ax, each.reshape(8, 8), title)
        ax.images[0].set_clim(-limit, limit)
        ax.set_xlabel(f"|cos| = {cosine:.2g}")


def terms(run: Run, axes: list[Axes], chosen: int | None = None) -> None:
    """Both terms of the Hessian of the probability, 64×64 pixels."""
    label = int(run.last.labels[DIGIT])

    def head(z: torch.Tensor) -> torch.Tensor:
        return z.softmax(0)[label]

    jacobian = jacrev(run.net)(run.x)
    outer = (jacobian.T @ hessian(head)(run.net(run.x)) @ jacobian).detach()
    inner = hessian(lambda x: head(run.net(x)))(run.x).detach() - outer
    norms = [float(each.norm()) for each in (outer, inner)]
    np.testing.assert_allclose(
        norms, [run.value(f"{n}_norm", "prob") for n in ("gauss_newton", "functional")], rtol=1e-3
    )
    titles = [f"{name}\nnorm {norm:.2g}" for name, norm in zip(TERMS, norms, strict=True)]
    for ax, values, title in zip(axes, (outer, inner), titles, strict=True):
        show_small(ax, values.numpy(), title)
    if chosen is not None:
        axes[chosen].title.set_fontweight("bold")


def alignment(run: Run, axes: list[Axes]) -> None:
    """The gradient and the top eigenvector."""
    found = run.value("gradient_alignment")
    directions = [run.unit_gradient, signed(run.vectors()[0], run.unit_gradient)]
    show_directions(axes, directions, ["gradient", "top eigenvector"], found)


def turned(run: Run, axes: list[Axes]) -> None:
    """The top eigenvector at the last two measurements."""
    found, before = run.value("top_eigenvector_cosine"), run.vectors(-2)[0]
    directions = [before, signed(run.vectors()[0], before)]
    show_directions(axes, directions, [f"v at step {record.step}" for record in run.logit[-2:]], found)


def signed(vector: Array, like: Array) -> Array:
    """Signs of eigenvectors are arbitrary: that which is closer."""
    return vector if vector @ like >= 0 else -vector


def overlap(run: Run, axes: Axes) -> None:
    """Squared cosines between the eigenvectors of both measurements."""
    before, now = (run.vectors(measurement)[:8].astype(np.float64) for measurement in (-2, -1))
    image = axes.imshow((before @ now.T) ** 2, cmap="Greys", vmin=0, vmax=1, extent=(0.5, 8.5, 8.5, 0.5))
    axes.figure.colorbar(image, ax=axes, label="squared cosine")
    old, new = (record.step for record in run.logit[-2:])
    axes.set(xlabel=f"eigenvector at step {new}", ylabel=f"at step {old}")
    axes.set_title(f"one digit: overlap {run.value('top_subspace_overlap'):.2g}", fontsize=10)


def rounding(run: Run, axes: list[Axes]) -> None:
    """A Hessian in float32, and how far it is from its transpose."""
    net, label = copy.deepcopy(run.net).float(), int(run.last.labels[DIGIT])
    found = hessian(lambda x: net(x)[label])(run.x.float()).detach().numpy()
    for ax, values, title in zip(axes, (found, found - found.T), ("H, 64×64", "H − Hᵀ"), strict=True):
        show_small(ax, values, title)


ONE: dict[str, Callable[[Run, Axes], None]] = {  # what stands on the right, in one panel
    "lambda_max": partial(one_eigenvalue, metric="lambda_max", place=np.argmax),
    "lambda_min": partial(one_eigenvalue, metric="lambda_min", place=np.argmin),
    "spectral_norm": partial(one_eigenvalue, metric="spectral_norm", place=lambda values: np.abs(values).argmax()),
    "trace": partial(by_sign, of=lambda up, down: f"one digit: {short(up)} − {short(-down)} = {short(up + down)}"),
    "frobenius_norm": squares,
    "gradient_norm": partial(along_gradient, parabola=False),
    "normalized_curvature": normalized,
    "linear_radius": radius,
    "negative_share": partial(by_sign, of=lambda up, down: f"one digit: blue is {-down / (up - down):.0%} of all"),
    "effective_rank": rank,
    "gradient_curvature": partial(along_gradient, parabola=True),
    "top_subspace_overlap": overlap,
}
TWO: dict[str, Callable[[Run, list[Axes]], None]] = {  # or in two
    "gauss_newton_norm": partial(terms, chosen=0),
    "functional_norm": partial(terms, chosen=1),
    "gauss_newton_share": terms,
    "gradient_alignment": alignment,
    "top_eigenvector_cosine": turned,
    "asymmetry": rounding,
}
