"""The table of metrics: tags, texts, arrays of events, data frames, tab, report and docs/metrics.md are made from it.

A new metric needs its definition, a property of ``Spectrum`` that gives ``[N, K]``, and a row in ``_ROWS``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from lightning_hessian.records.validity import AGREEMENT

SPECTRUM = "curvature.spectrum.Spectrum"
COMPARISON = "records.subspace.SubspaceOverlap"
CURVATURE = "target per input unit²"
SLOPE = "target per input unit"


@dataclass(frozen=True)
class Metric:
    """One number per sample and class.

    Attributes:
        name: of the property, the array, the column, and in tags.
        title: a short name for readers.
        unit: empty for pure numbers; "target" stands for the target's name.
        formula: with λ the eigenvalues of the Hessian H, v its unit eigenvectors, and g the gradient.
        meaning: how to read it, without the final full stop.
        defined_in: the class that computes it.
        is_logged: whether its mean and percentiles over samples become scalars.
        has_error: whether ``<name>_error`` is its standard error.
        is_error: whether it is such a standard error.
        depends_on: the eigenvalue, or eigenvalues, that must have converged for it to be right.
        needs_all: whether it is unknown where only the ends of a spectrum are.
        reading: what a value says, as a sentence, for ``Record.summary``; to second order in the input.
    """

    name: str
    title: str
    unit: str
    formula: str
    meaning: str
    defined_in: str = SPECTRUM
    is_logged: bool = False
    has_error: bool = False
    is_error: bool = False
    depends_on: Literal["largest", "smallest", "largest magnitude", "both ends"] | None = None
    needs_all: bool = False
    reading: Callable[[float], str] | None = None

    @property
    def is_comparison(self) -> bool:
        """Whether it compares with the previous measurement; NaN until it has been compared."""
        return self.defined_in == COMPARISON


def _step_along(value: float) -> str:
    return f"A step of length r along it adds {0.5 * value:.2g} · r² to what the gradient predicts."


def _change_of_gradient(value: float) -> str:
    if value == 0:
        return "The gradient does not change around the sample."
    return (
        f"A step of {1 / value:.2g} input units along the most curved direction changes the gradient by its own norm."
    )


_ROWS = (
    Metric(
        "lambda_max",
        "largest λ",
        CURVATURE,
        "max λ",
        "how strongly the target curves upwards along its most curved direction",
        is_logged=True,
        depends_on="largest",
        reading=_step_along,
    ),
    Metric(
        "lambda_min",
        "smallest λ",
        CURVATURE,
        "min λ",
        "how strongly the target curves downwards along its most curved direction",
        is_logged=True,
        depends_on="smallest",
        reading=_step_along,
    ),
    Metric(
        "spectral_norm",
        "max |λ|",
        CURVATURE,
        "max |λ|",
        "the strongest curvature, whatever its sign",
        is_logged=True,
        depends_on="largest magnitude",
    ),
    Metric(
        "trace",
        "trace",
        CURVATURE,
        "Σ λ",
        "the sum of all eigenvalues (the Laplacian): upward minus downward curvature",
        is_logged=True,
        has_error=True,
        reading=lambda value: (
            f"Noise of variance s² in every input changes the target by {0.5 * value:.2g} · s² on average."
        ),
    ),
    Metric(
        "frobenius_norm",
        "Frobenius norm",
        CURVATURE,
        "√Σ λ²",
        "the square root of the sum of squared eigenvalues: all curvature, whatever its sign",
        is_logged=True,
        has_error=True,
    ),
    Metric("gradient_norm", "gradient norm", SLOPE, "‖g‖", "how steep the target is", is_logged=True),
    Metric(
        "normalized_curvature",
        "normalized curvature",
        "1 / input unit",
        "max |λ| / ‖g‖",
        "curvature normalized by the gradient norm, which does not change when the output is rescaled",
        is_logged=True,
        depends_on="largest magnitude",
        reading=_change_of_gradient,
    ),
    Metric(
        "linear_radius",
        "linear radius",
        "input units",
        "2 ‖g‖ / max |λ|",
        "the L2 distance from the sample at which the second-order term may equal the first-order term; a linear "
        "approximation (saliency, FGSM) holds only well within it",
        is_logged=True,
        depends_on="largest magnitude",
        reading=lambda value: (
            f"Within a tenth of it, {value / 10:.2g} input units, what the gradient leaves out is at most 10 % of its "
            f"largest effect."
        ),
    ),
    Metric(
        "gauss_newton_norm",
        "norm of the Gauss–Newton term",
        CURVATURE,
        "‖JᵀAJ‖",
        "the curvature that comes from the target (such as the softmax), in the Frobenius norm",
        has_error=True,
    ),
    Metric(
        "functional_norm",
        "norm of the functional term",
        CURVATURE,
        "‖Σ ∂τ/∂z ∇²z‖",
        "the curvature of the network's outputs themselves, in the Frobenius norm",
        has_error=True,
    ),
    Metric(
        "gauss_newton_share",
        "Gauss–Newton share",
        "",
        "‖JᵀAJ‖ / (‖JᵀAJ‖ + ‖Σ ∂τ/∂z ∇²z‖)",
        "the share of the curvature that comes from the target (such as the softmax); the rest is the curvature of the "
        "outputs themselves. If curvature falls while the share is near 1, the softmax may simply be saturating",
        is_logged=True,
        has_error=True,
        reading=lambda value: (
            f"About {100 * value:.0f} % comes from the target over the outputs, and {100 - 100 * value:.0f} % from the "
            f"outputs themselves."
        ),
    ),
    Metric(
        "negative_share",
        "negative share",
        "",
        "Σ_{λ<0} |λ| / Σ |λ|",
        "how much of Σ |λ| comes from negative eigenvalues",
        needs_all=True,
        reading=lambda value: f"About {100 * value:.0f} % of the curvature bends the target downwards.",
    ),
    Metric(
        "effective_rank",
        "effective rank",
        "",
        "(Σ |λ|)² / Σ λ²",
        "how many directions share the curvature",
        needs_all=True,
        reading=lambda value: f"The curvature is as concentrated as if {value:.3g} directions shared it equally.",
    ),
    Metric(
        "gradient_curvature",
        "curvature along the gradient",
        CURVATURE,
        "gᵀHg / gᵀg",
        "the curvature in the direction of the gradient",
    ),
    Metric(
        "gradient_alignment",
        "gradient alignment",
        "",
        "|gᵀv| / ‖g‖",
        "|cos| between the gradient and the eigenvector of largest |λ|",
        depends_on="both ends",
    ),
    Metric(
        "top_eigenvector_cosine",
        "top-eigenvector cosine",
        "",
        "|vᵀv′|",
        "|cos| between the top eigenvectors of this measurement and the previous one: 1 means that they have not "
        "turned. Degenerate eigenvectors are compared as a group. Undefined if no gap separates them from the rest",
        COMPARISON,
        is_logged=True,
        depends_on="both ends",
    ),
    Metric(
        "top_subspace_overlap",
        "top-subspace overlap",
        "",
        "‖VᵀV′‖² / k",
        "the overlap of the subspaces of the k top eigenvectors of this measurement and the previous one, with k at "
        "the clearest gap of both spectra: 1 means that they are the same. Undefined if there is no gap",
        COMPARISON,
        is_logged=True,
        depends_on="both ends",
    ),
    Metric(
        "asymmetry",
        "asymmetry",
        "",
        "‖H − Hᵀ‖ / ‖H‖",
        "how far the computed Hessian is from symmetric: rounding, unless something is wrong",
    ),
)


def _with_errors(rows: tuple[Metric, ...]) -> Iterator[Metric]:
    """Each metric, followed by its standard error where it has one."""
    for row in rows:
        yield row
        if row.has_error:
            title = f"{row.title}: standard error"
            meaning = f"standard error of the {row.title}; 0 where it is exact"
            yield Metric(f"{row.name}_error", title, row.unit, "", meaning, is_error=True)


METRICS = tuple(_with_errors(_ROWS))
BY_NAME = {metric.name: metric for metric in METRICS}
SUMMARIZED = tuple(metric for metric in METRICS if metric.reading is not None)
LOGGED = tuple(metric for metric in METRICS if metric.is_logged)


def to_markdown() -> str:
    """The page docs/metrics.md."""
    names = {True: "`hessian_{0}/…`, `record.{0}`", False: "`record.{0}`"}
    rows = [[m.title, names[m.is_logged].format(m.name), m.formula, m.unit or "none", f"{m.meaning}."] for m in _ROWS]
    head = [["metric", "name", "formula", "unit", "meaning"], ["---"] * 5]
    table = "\n".join(f"| {' | '.join(escaped(cell) for cell in row)} |" for row in [*head, *rows])
    defined_in = "\n".join(
        f"- `lightning_hessian.{where}`: {', '.join(f'`{m.name}`' for m in _ROWS if m.defined_in == where)}"
        for where in (SPECTRUM, COMPARISON)
    )
    with_errors = ", ".join(f"`{m.name}_error`" for m in _ROWS if m.has_error)
    return f"""# Metrics

Each metric is one number per sample and class, computed from the Hessian H of the target with respect to the input. Its
eigenvalues are λ, its eigenvectors v, and g is the gradient; a prime marks the previous measurement. "Target" in a unit
stands for `logit`, `prob`, … The two terms of H = JᵀAJ + Σ ∂τ/∂z ∇²z contain the outputs z, their Jacobian J, and the
Hessian A of the target τ with respect to z.

Names with a slash are TensorBoard tags; they hold the mean over samples, with the 10th and 90th percentiles under
`hessian_spread/…`. Every metric is an attribute of a record, `[samples, classes]`, and a column of `to_dataframe`.

{table}

These attributes hold standard errors, which are 0 for exact values: {with_errors}.

Where the metrics are defined in the code:

{defined_in}

## Checks

`record.finite_difference_error` `[samples, classes]` is the relative error of a Hessian: the difference between its
curvature along one direction and a central difference of values at the sample itself, divided by max |λ| (not divided
for a zero Hessian). It is NaN if the sample was not checked at this measurement (later measurements check only some
of the samples, in rotation), or could not be confirmed. The tab and the texts call up to {AGREEMENT:g} agreement, the
largest error that is [accepted anywhere](concepts/checks.md); if rounding is the only error, it is far smaller.

`record.valid` `[samples, classes]` is False where the Hessian is wrong or not finite, and `record.message` says at
which samples and why. All numbers of such a sample and class are NaN, none of its eigenvalues count as converged, and
means, percentiles and histograms leave it out; use `numpy.nanmean` for means of your own. The tab, the report and the
texts call it "not valid". Both attributes are columns of `to_dataframe`.

This page is generated: `python -m lightning_hessian.records.metrics > docs/metrics.md`.
"""


def escaped(cell: str) -> str:
    """Text for a cell of a markdown table."""
    return cell.replace("|", "\\|")


if __name__ == "__main__":
    print(to_markdown(), end="")
