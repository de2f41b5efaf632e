"""Compares what is measured of a function with float64 differences of its values, computed here and nowhere else."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_hessian import input_gradient, input_hessian, input_spectrum
from lightning_hessian.errors import ConfigurationError, MeasurementError
from lightning_hessian.model.state_snapshot import unchanged

Verdict = Literal["wrong", "crashed", "alarmed", "refused", "caught", "undecidable", "right"]
VERDICTS: tuple[Verdict, ...] = ("wrong", "crashed", "alarmed", "refused", "caught", "undecidable", "right")
TOLERANCE = {torch.float64: 1e-2, torch.float32: 3e-2}  # relative to the largest entry
SHARP = 1e-2  # relative: differences with two steps must agree so far, to be taken for the truth
SHARPEST = 1e-4  # relative: no other step is tried
# In root mean squares of the input, each with its double and that one's; the long ones are for values as noisy as
# float32's.
STEPS = (1e-2, 1e-3, 3e-2, 1e-1, 1e-4)
AT_A_TIME = 16  # points whose values are computed in one batch, for the sake of memory
EPS = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Case:
    """A function of one input.

    Attributes:
        key: where it comes from.
        model: from ``[N, D]`` to ``[N, 2]``, in the dtype of its argument.
        x: ``[3, D]``, in float64.
        description: of the input, for those who want to see it again.
    """

    key: str
    model: Callable[[Tensor], Tensor]
    x: Tensor
    description: str = ""


@dataclass(frozen=True)
class Truth:
    """Derivatives from values alone, of N samples and K outputs.

    Attributes:
        kind: ``[N]``, one of ``smooth``, ``rough`` (differences do not settle: a kink, a jump, the border of a domain),
            ``random`` or ``not finite``.
        gradient: ``[N, K, D]``.
        hessian: ``[N, K, D, D]``.
        gradient_blur, hessian_blur: ``[N, K]``, what the last step of their extrapolation changed, and rounding: half
            of what they may be off by.
    """

    kind: list[str]
    gradient: Tensor
    hessian: Tensor
    gradient_blur: Tensor
    hessian_blur: Tensor


@dataclass(frozen=True)
class Judgement:
    """What came out of one measurement of a case."""

    key: str
    how: str
    verdict: Verdict
    message: str = ""
    error: float | None = None


def truth_of(case: Case) -> Truth:
    """Gradients and Hessians by central differences with two steps, of every sample in a batch of its own."""
    with unchanged(case.model):  # what a forward keeps for later ones is in float64
        found = [_truth_at(case, x.unsqueeze(0)) for x in case.x]
    stacked = [torch.stack([f[i] for f in found]) for i in range(1, 5)]
    return Truth([f[0] for f in found], *stacked)


def _truth_at(case: Case, x: Tensor) -> tuple[str, Tensor, Tensor, Tensor, Tensor]:
    with torch.no_grad():
        value, again = (case.model(x.clone())[0].double() for _ in range(2))
    num_inputs = x.shape[1]
    nothing = torch.full((len(value),), torch.nan, dtype=torch.float64)
    none = (nothing[:, None].expand(-1, num_inputs), nothing[:, None, None].expand(-1, num_inputs, num_inputs))
    if not value.isfinite().all():
        return "not finite", *none, nothing, nothing
    if not torch.equal(value, again):
        return "random", *none, nothing, nothing
    scale = float(x.square().mean().sqrt()) or 1.0
    best: tuple[Tensor, ...] | None = None
    found: dict[float, tuple[Tensor, ...]] = {}
    for step in STEPS:
        h = step * scale
        (g1, h1, size), (g2, h2, _), (g4, h4, _) = (_differences(case, x, value, m * h) for m in (1, 2, 4))
        gradient, slope_change = _extrapolated(g1, g2, g4)
        hessian, change = _extrapolated(h1, h2, h4)
        blur = change.abs().amax((1, 2)) + 16 * EPS * size / h**2
        slope_blur = slope_change.abs().amax(1) + 4 * EPS * size / h
        found[step] = gradient, hessian, slope_blur, blur
        if best is None:
            best = found[step]
        else:
            better = (blur < best[3]) | best[3].isnan()
            best = tuple(
                n.where(better.reshape(-1, *[1] * (n.dim() - 1)), b) for n, b in zip(found[step], best, strict=True)
            )
        if bool((best[3] <= SHARPEST * best[1].abs().amax((1, 2))).all()):
            break
    assert best is not None
    size = best[1].abs().amax((1, 2))
    floor = 1e-6 * (value.abs() + 1) / scale**2  # a curvature below this is zero for all that values can tell
    sharp = (best[3] <= SHARP * size) | (best[3] <= floor)
    if len(found) == len(STEPS):
        sharp &= _is_steady(found, best, 1e-3 * (value.abs() + 1) / scale)
    return ("smooth" if sharp.all() else "rough"), *best


def _is_steady(found: dict[float, tuple[Tensor, ...]], best: tuple[Tensor, ...], negligible: Tensor) -> Tensor:
    """``[K]``, whether the shortest step (or the next, where that is the best) has about the gradient of the best.

    Stairs have none for short steps, and that of a slope for long ones.
    """
    shortest, second = (found[step] for step in sorted(found)[:2])
    is_shortest = shortest[3] == best[3]
    gradient = second[0].where(is_shortest.unsqueeze(1), shortest[0])
    blur = second[2].where(is_shortest, shortest[2])
    return blur + (gradient - best[0]).abs().amax(1) <= 0.1 * best[0].abs().amax(1) + negligible


def _extrapolated(at_h: Tensor, at_2h: Tensor, at_4h: Tensor) -> tuple[Tensor, Tensor]:
    """Richardson's extrapolation of central differences, and what it changed in its last step."""
    first, second = (4 * at_h - at_2h) / 3, (4 * at_2h - at_4h) / 3
    return (16 * first - second) / 15, first - second


def _differences(case: Case, x: Tensor, value: Tensor, h: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient ``[K, D]``, Hessian ``[K, D, D]`` and largest value ``[K]``."""
    d = x.shape[1]
    upper, lower = torch.triu_indices(d, d, 1)
    eye = torch.eye(d, dtype=x.dtype)
    shifts = [eye, -eye]
    shifts += [a * eye[upper] + b * eye[lower] for a, b in ((1, 1), (1, -1), (-1, 1), (-1, -1))]
    with torch.no_grad():
        points = (x + h * torch.cat(shifts)).split(AT_A_TIME)
        values = torch.cat([case.model(some) for some in points]).double()
    up, down, *corners = values.split([d, d, *[len(upper)] * 4])
    hessian = value.new_empty(len(value), d, d)
    hessian[:, range(d), range(d)] = ((up - 2 * value + down) / h**2).T
    mixed = ((corners[0] - corners[1] - corners[2] + corners[3]) / (4 * h**2)).T
    hessian[:, upper, lower] = hessian[:, lower, upper] = mixed
    return ((up - down) / (2 * h)).T, hessian, torch.maximum(value.abs(), values.abs().nan_to_num(0).amax(0))


def judge(case: Case, truth: Truth, how: str) -> Judgement:
    """Measures a case in one way, and judges the result.

    Args:
        case: what is measured.
        truth: from ``truth_of``.
        how: function, number of samples and dtype, such as ``spectrum 3 float64``.
    """
    function, count, name = how.split()
    num_samples, dtype = int(count), getattr(torch, name)
    x = case.x[:num_samples].to(dtype)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            result = _measured(function, case.model, x)
            gradient = input_gradient(case.model, x, "all") if function == "hessian" else result.gradient
        except (ConfigurationError, MeasurementError) as error:
            return Judgement(case.key, how, "refused", str(error)[:600])
        except Exception as error:
            return Judgement(case.key, how, "crashed", f"{type(error).__name__}: {error}"[:600])
    said = " ".join(str(w.message) for w in heard if "cannot be trusted" in str(w.message))
    error, strict, valid = _errors(function, result, gradient, truth, dtype, said)
    return _verdict(case, how, truth, error, strict, valid, said)


def _measured(function: str, model: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    if function == "hessian":
        return input_hessian(model, x, "all")
    return input_spectrum(model, x, "all", method="lanczos" if function == "lanczos" else "auto")


def _errors(
    function: str, result: Any, gradient: Tensor, truth: Truth, dtype: torch.dtype, said: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Relative errors ``[N, K]`` beyond what the truth may be off by, and which entries count as valid.

    The first errors allow for rounding as well: what is beyond them is wrong. What is not beyond the second is right.
    """
    n = len(gradient)
    reference, blur = truth.hessian[:n], truth.hessian_blur[:n]
    size = reference.abs().amax((2, 3))
    if function == "hessian":
        found = result.double()
        away = (found - reference).abs().amax((2, 3))
        size = torch.maximum(size, found.abs().amax((2, 3)))
        valid = torch.full(size.shape, not said)
    else:
        eigenvalues, exact = result.eigenvalues.double(), torch.linalg.eigvalsh(reference.nan_to_num(0))
        zeros = eigenvalues.new_zeros(*size.shape, exact.shape[-1] - eigenvalues.shape[-1])
        if function == "lanczos" and not result.complete and zeros.shape[-1]:  # only the ends are known
            pairs = [(result.lambda_max, exact[..., -1]), (result.lambda_min, exact[..., 0])]
            away = torch.stack([(a.double() - b).abs() for a, b in pairs]).amax(0)
        else:
            away = (torch.cat([eigenvalues, zeros], -1).sort(-1).values - exact).abs().amax(-1)
            away = torch.maximum(away, (result.trace.double() - exact.sum(-1)).abs() / exact.shape[-1])
        size = torch.maximum(size, result.spectral_norm.double())
        valid = result.valid
    rounding = (1e-6 if dtype == torch.float32 else 1e-12) * (1 + truth.gradient[:n].abs().amax(2))
    slope_size = truth.gradient[:n].abs().amax(2)
    slope_away = (gradient.double() - truth.gradient[:n]).abs().amax(2)
    # Values cannot tell a difference below their blur.
    beyond = away - blur * (reference.shape[-1] if function != "hessian" else 2)
    slope_beyond = slope_away - 2 * truth.gradient_blur[:n]

    def relative(allowed: Tensor | float) -> Tensor:
        error = (beyond - allowed).clamp_min(0) / size.where(size > 0, 1)
        slope_error = (slope_beyond - allowed).clamp_min(0) / slope_size.where(slope_size > 0, 1)
        return torch.maximum(error, slope_error)

    return relative(rounding), relative(0.0), valid


def _verdict(case: Case, how: str, truth: Truth, error: Tensor, strict: Tensor, valid: Tensor, said: str) -> Judgement:
    """The worst over samples and outputs."""
    dtype = getattr(torch, how.split()[2])
    verdicts: set[Verdict] = set()
    worst, one_for_all = 0.0, how.startswith("hessian")
    good = [False] * len(error)
    for sample in range(len(error)):
        kind = truth.kind[sample]
        is_off = not bool((error[sample] <= TOLERANCE[dtype]).all())
        good[sample] = kind == "smooth" and bool((strict[sample] <= TOLERANCE[dtype]).all())
        if kind == "rough":
            verdicts.add("undecidable")
        elif not valid[sample].all():
            if good[sample] and not one_for_all:
                verdicts.add("alarmed")
            else:
                verdicts.add("caught" if not good[sample] else "right")
        elif kind in ("random", "not finite"):
            is_number = bool(error[sample].isfinite().any())
            verdicts.add("wrong" if kind == "random" or is_number else "right")
        else:
            verdicts.add("wrong" if is_off else "right")
            worst = max(worst, float(error[sample].nan_to_num(float("inf")).max()))
    if one_for_all and said and all(good):
        verdicts.add("alarmed")
    verdict = min(verdicts, key=VERDICTS.index)
    detail = said if verdict in ("alarmed", "caught", "undecidable") else ""
    if verdict != "right":
        detail = f"[{', '.join(truth.kind[: len(error)])}] {detail}"
    return Judgement(case.key, how, verdict, detail[:600], worst)
