"""Are digits of high curvature misclassified more often? 1,000 held-out MNIST digits, and what flips them.

Trains the network of mnist_cnn.py for two epochs, measures the input Hessian at every held-out digit, and looks for
the smallest perturbation along the gradient and along the most curved direction that changes the predicted class.
Prints and draws how the normalized curvature, max |λ| / ‖g‖, is related to misclassification and to that distance, with
and without holding the margin fixed.

    python examples/curvature_and_errors.py                     # ReLU: curvature of log_prob, exact; a minute
    python examples/curvature_and_errors.py --activation gelu   # GELU: curvature of the margin itself; some minutes
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from lightning.pytorch import Trainer, seed_everything
from mnist_cnn import MnistCNN, digits
from scipy.stats import rankdata
from torch.utils.data import DataLoader

from lightning_hessian import InputHessianRecorder, Record

# What is differentiated: for ReLU the logits and their margin are piecewise linear, and have no curvature of their own.
TARGETS = {"relu": "log_prob", "gelu": "margin"}
METHODS = {"relu": "low_rank", "gelu": "lanczos"}
RADII = np.geomspace(
    0.1, 10, 17
)  # L2 distances, in pixel units (0 is black, 1 is white), at which a flip is looked for
NUM_BISECTIONS = 4
NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class Digits:
    """What is known about every digit, ``[N]`` each.

    Attributes:
        curvature: normalized, max |λ| / ‖g‖.
        margin: largest logit minus the second largest.
        wrong: whether the prediction is.
        along_gradient: distance of the flip along ± the gradient, infinite where there was none.
        along_eigenvector: the same along ± the eigenvector of largest |λ|.
    """

    curvature: np.ndarray
    margin: np.ndarray
    wrong: np.ndarray
    along_gradient: np.ndarray
    along_eigenvector: np.ndarray

    @property
    def flip(self) -> np.ndarray:
        """The smaller of the two distances."""
        return np.minimum(self.along_gradient, self.along_eigenvector)


def predicted(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Classes of images, some hundred at a time."""
    with torch.no_grad():
        return torch.cat([model(part).argmax(1) for part in x.split(250)])


def distance_to_flip(model: torch.nn.Module, x: torch.Tensor, directions: torch.Tensor) -> np.ndarray:
    """How far each image moves along its unit direction until its class changes: first on ``RADII``, then bisected."""
    before = predicted(model, x)
    low, high = np.zeros(len(x)), np.full(len(x), np.inf)

    def flips(which: np.ndarray, radius: np.ndarray) -> np.ndarray:
        steps = torch.tensor(radius, dtype=x.dtype).reshape(-1, *[1] * (x.dim() - 1))
        return (predicted(model, x[which] + steps * directions[which]) != before[which]).numpy()

    for radius in RADII:
        which = np.flatnonzero(np.isinf(high))
        if not len(which):
            break
        is_flipped = flips(which, np.full(len(which), radius))
        high[which[is_flipped]], low[which[~is_flipped]] = radius, radius
    which = np.flatnonzero(np.isfinite(high))
    for _ in range(NUM_BISECTIONS if len(which) else 0):
        middle = (low[which] + high[which]) / 2
        is_flipped = flips(which, middle)
        high[which[is_flipped]], low[which[~is_flipped]] = middle[is_flipped], middle[~is_flipped]
    return high


def look(model: torch.nn.Module, x: torch.Tensor, record: Record) -> Digits:
    """Margins and flips of the digits whose Hessian is valid and whose gradient is not zero."""
    usable = np.flatnonzero(record.valid[:, 0] & np.isfinite(record.normalized_curvature[:, 0]))
    x = x[usable]
    with torch.no_grad():
        top = torch.cat([model(part).topk(2).values for part in x.split(250)])
    distances = []
    for vectors in (record.gradient[usable, 0], record.eigenvectors[usable, 0, 0]):
        unit = torch.tensor(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).reshape(x.shape).to(x)
        distances.append(np.minimum(*(distance_to_flip(model, x, sign * unit) for sign in (1, -1))))
    wrong = record.predicted[usable] != record.labels[usable]
    return Digits(record.normalized_curvature[usable, 0], (top[:, 0] - top[:, 1]).numpy(), wrong, *distances)


def correlation(a: np.ndarray, b: np.ndarray, given: np.ndarray | None = None) -> float:
    """Spearman's; with ``given``, of what is left of both ranks once they are regressed on its ranks."""
    ranks = np.stack([rankdata(a), rankdata(b)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    if given is not None:
        z = rankdata(given)
        z -= z.mean()
        ranks -= (ranks @ z / (z @ z))[:, None] * z
    with np.errstate(invalid="ignore"):  # undefined where all are alike: no wrong digit
        return float(ranks[0] @ ranks[1] / np.sqrt((ranks[0] @ ranks[0]) * (ranks[1] @ ranks[1])))


def interval(*columns: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of ``correlation`` when the digits are drawn again, with replacement."""
    generator = np.random.default_rng(0)
    draws = generator.integers(len(columns[0]), size=(NUM_RESAMPLES, len(columns[0])))
    found = [correlation(*(column[draw] for column in columns)) for draw in draws]
    known = [each for each in found if np.isfinite(each)]
    low, high = np.percentile(known, [2.5, 97.5]) if known else (np.nan, np.nan)
    return float(low), float(high)


def correlations(found: Digits) -> dict[str, tuple[float, float, float]]:
    """Each with its 95 % interval."""
    curvature, wrong, margin = found.curvature, found.wrong.astype(float), found.margin
    pairs = {
        "wrong": (curvature, wrong),
        "wrong, given the margin": (curvature, wrong, margin),
        "distance of the flip": (curvature, found.flip),
        "distance of the flip, given the margin": (curvature, found.flip, margin),
        "margin": (curvature, margin),
    }
    return {name: (correlation(*columns), *interval(*columns)) for name, columns in pairs.items()}


def draw(found: Digits, rows: dict[str, tuple[float, float, float]], path: Path) -> None:
    """Three panels: curvature of right and wrong digits; against the flip; the correlations with their intervals."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    bins = np.linspace(*np.percentile(found.curvature, [0, 99.5]), 21)
    groups = {"right": (~found.wrong, "#2166ac"), "wrong": (found.wrong, "#b2182b")}
    for name, (which, color) in groups.items():
        label = f"{name} ({which.sum()})"
        left.hist(
            found.curvature[which], bins, density=True, histtype="stepfilled", alpha=0.5, color=color, label=label
        )
        middle.scatter(found.curvature[which], found.flip[which], s=9, alpha=0.6, color=color, label=label)
    left.set(xlabel="max |λ| / ‖g‖  (1 / pixel unit)", ylabel="density", title="Right and wrong digits")
    middle.set(yscale="log", xlabel="max |λ| / ‖g‖  (1 / pixel unit)")
    middle.set(ylabel="distance of the flip (pixel units)", title="Smallest perturbation found")
    left.legend()
    middle.legend()
    for place, (name, (value, low, high)) in enumerate(reversed(rows.items())):
        color = "#e65100" if "given" in name else "black"
        right.errorbar(value, place, xerr=[[value - low], [high - value]], fmt="o", color=color, capsize=3)
    right.axvline(0, color="gray", linewidth=0.8)
    right.set_yticks(range(len(rows)), list(reversed(rows)))
    right.set(xlim=(-1, 1), xlabel="Spearman correlation with max |λ| / ‖g‖", title="95 % bootstrap intervals")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def conclusions(found: Digits, rows: dict[str, tuple[float, float, float]], target: str) -> str:
    """What one may and may not conclude, in words."""
    lines = [
        f"{len(found.wrong)} digits: {(~found.wrong).sum()} right, {found.wrong.sum()} wrong.",
        f"Normalized curvature of {target}, median: right {np.median(found.curvature[~found.wrong]):.3g}"
        + (f", wrong {np.median(found.curvature[found.wrong]):.3g}." if found.wrong.any() else "."),
    ]
    names = {"along_gradient": "± the gradient", "along_eigenvector": "± the top eigenvector"}
    for name, words in names.items():
        distance = getattr(found, name)
        is_flipped = np.isfinite(distance)
        median = f", median distance {np.median(distance[is_flipped]):.3g}" if is_flipped.any() else ""
        lines.append(f"Along {words}: {is_flipped.sum()} flip within {RADII[-1]:g}{median}.")
    nearer = (found.along_eigenvector < found.along_gradient).mean()
    lines += [f"The eigenvector flips sooner than the gradient for {nearer:.0%}.", "", "Spearman correlation with it:"]
    for name, (value, low, high) in rows.items():
        sign = "positive" if low > 0 else "negative" if high < 0 else "not distinguishable from 0"
        lines.append(f"  {name}: {value:+.2f} (95 % interval {low:+.2f} to {high:+.2f}), {sign}")
    lines += [
        "",
        "One may conclude: for this network and these digits, the signs above whose interval excludes 0.",
        "One may not conclude that curvature causes errors, or that another network behaves alike:",
        "- The margin goes with all three. Compare the lines with and without it; what is left once it is taken out of",
        "  the ranks linearly may still be the margin in another shape, or steepness: ‖g‖ is in the ratio.",
        f"- {found.wrong.sum()} wrong digits are few: the interval of 'wrong' is as wide as that.",
        "- The intervals are for other digits of the same kind. Another seed, training or architecture is not in them:",
        "  train several networks.",
        "- Distances are the smallest of four straight lines, on a grid: upper bounds of the least perturbation, which",
        "  may leave the range of pixel values.",
    ]
    if target == "log_prob":
        lines += [
            "- A ReLU network is piecewise linear: all curvature here is that of the softmax over it, which depends on",
            "  the margin by its formula. --activation gelu measures the curvature of the margin itself.",
        ]
    return "\n".join(lines)


def main() -> None:
    """Trains, measures, searches, concludes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", choices=TARGETS, default="relu")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--num-samples", type=int, default=1000, help="of the 1,000 held-out digits")
    parser.add_argument("--log-dir", default="demo_logs/curvature_and_errors")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    train, held_out = digits()
    model = MnistCNN(args.activation)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "devices": 1}
    trainer = Trainer(max_epochs=args.epochs, accelerator="cpu", **quiet)
    trainer.fit(model, DataLoader(train, batch_size=64, shuffle=True))
    model.eval()
    x, labels = (tensor[: args.num_samples] for tensor in held_out.tensors)
    target, method = TARGETS[args.activation], METHODS[args.activation]
    options = {"num_samples": len(x), "num_eigenvalues": 2, "heatmap_samples": 0, "max_memory": 2**30}
    with InputHessianRecorder(args.log_dir, (x, labels), "predicted", target, method=method, **options) as recorder:
        record = recorder.measure(model, step=trainer.global_step)
    print(record.summary(), "\n")
    found = look(model, x, record)
    print(f"Held-out accuracy: {(record.predicted == record.labels).mean():.1%}")
    rows = correlations(found)
    print(conclusions(found, rows, target))
    path = Path(args.log_dir) / "curvature_and_errors.png"
    draw(found, rows, path)
    print(
        f"\nPicture: {path}\n"
        f"Every digit: .venv/bin/tensorboard --logdir {args.log_dir}, then open the tab Input Hessian"
    )


if __name__ == "__main__":
    main()
