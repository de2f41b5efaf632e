"""What several seeds say together: means with standard errors, intervals, and claims judged by them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.stats import t as student


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: over seeds.
        error: its standard error; NaN for a single seed.
        interval: its 95 % interval, by Student's t.
    """

    mean: float
    error: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, values: np.ndarray) -> Estimate:
        """From one value for each seed."""
        error = float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else np.nan
        half = error * student.ppf(0.975, max(len(values) - 1, 1))
        return cls(float(values.mean()), error, (float(values.mean() - half), float(values.mean() + half)))

    def verdict(self, below: str, above: str, otherwise: str) -> str:
        """``below`` or ``above`` where the interval excludes 0."""
        low, high = self.interval
        return below if high < 0 else above if low > 0 else otherwise


@dataclass(frozen=True)
class Claim:
    """What is said to be so, what came out, and whether they agree."""

    says: str
    measured: str
    verdict: str

    @classmethod
    def lower(cls, says: str, before: np.ndarray, after: np.ndarray, source: str = "published") -> Claim:
        """That a quantity is lower in another setting, by the ratio of networks of the same seed."""
        ratio = Estimate.of(np.log(after / before))
        low, high = np.exp(ratio.interval)
        verdict = ratio.verdict(f"as {source}", "**opposite**", "not seen")
        return cls(says, f"× {np.exp(ratio.mean):.3g} ({low:.3g} to {high:.3g})", verdict)

    @classmethod
    def higher(cls, says: str, before: np.ndarray, after: np.ndarray, source: str = "published") -> Claim:
        """That it is higher."""
        ratio = Estimate.of(np.log(after / before))
        low, high = np.exp(ratio.interval)
        verdict = ratio.verdict("**opposite**", f"as {source}", "not seen")
        return cls(says, f"× {np.exp(ratio.mean):.3g} ({low:.3g} to {high:.3g})", verdict)

    @classmethod
    def gain(cls, says: str, before: np.ndarray, after: np.ndarray, at_least: float = 0.0) -> Claim:
        """That an accuracy gains at least so many percentage points, by the difference of the same seed."""
        points = Estimate.of(100 * (after - before))
        low, high = points.interval
        verdict = "as published" if low > at_least else "**opposite**" if high < at_least else "not seen"
        return cls(says, f"{points.mean:+.1f} points ({low:+.1f} to {high:+.1f})", verdict)

    @classmethod
    def exact(cls, says: str, measured: str, holds: bool) -> Claim:
        """An identity, which holds for any seed."""
        return cls(says, measured, "as expected" if holds else "**not as expected**")


@dataclass
class Result:
    """What one experiment found: by setting and quantity, one value for each seed."""

    rows: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    claims: list[Claim] = field(default_factory=list)

    def add(self, setting: str, values: dict[str, float]) -> None:
        """The values of one more seed."""
        row = self.rows.setdefault(setting, {})
        for name, value in values.items():
            row[name] = np.append(row.get(name, []), value)

    def estimate(self, setting: str, name: str) -> Estimate:
        """Of one quantity."""
        return Estimate.of(self.rows[setting][name])

    def pair(self, name: str, before: str, after: str) -> tuple[np.ndarray, np.ndarray]:
        """A quantity in two settings."""
        return self.rows[before][name], self.rows[after][name]

    def to_markdown(self) -> str:
        """Means with standard errors, then the claims."""
        names = list(next(iter(self.rows.values())))
        lines = [["", *names], ["---"] * (len(names) + 1)]
        for setting in self.rows:
            cells = (self.estimate(setting, name) for name in names)
            lines.append([setting, *(f"{cell.mean:.3g} ± {cell.error:.2g}" for cell in cells)])
        lines += [[], ["claim", "here (95 % interval)", "verdict"], ["---"] * 3]
        lines += [[claim.says, claim.measured, claim.verdict] for claim in self.claims]
        escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
        return "\n".join(f"| {' | '.join(line)} |" if line else "" for line in escaped)
