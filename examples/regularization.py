"""Does regularization flatten the network? Five ways to train on digits, five seeds each, in one TensorBoard.

A small GELU network learns scikit-learn's digits (8x8, D = 64) without regularization, with weight decay, with a
penalty on the input gradient of the loss (Drucker and LeCun, 1992), with noise on the inputs, and with dropout. With
the same seed, all start from the same weights. At held-out digits, it measures the curvature of the label's logit (the
largest λ, max |λ|, and the normalized curvature max |λ| / ‖g‖), and the accuracy on clean digits, on digits perturbed
at random, and on digits perturbed by as much along the sign of the gradient (FGSM). Prints a table and draws it, with
standard errors over seeds; the statistics and FGSM are in experiments/.

    python examples/regularization.py                                     # a minute
    python examples/regularization.py --strength gradient_penalty=0.02    # another strength

What you can conclude: for this network, these digits and these strengths, which differences from the unregularized
network are larger than the variation between seeds. The table has 95 % intervals of the difference between networks of
the same seed; of the 28, one or two may exclude 0 by chance.

What you cannot conclude:

- that one method flattens more than another: each has one strength here, and strengths have no common unit;
- that a flatter network is more robust because it is flatter. What makes a logit less curved often makes it less steep,
  which lowers both max |λ| and the damage done by FGSM. Normalized curvature divides that out. Weight decay lowers both
  measures of curvature here, yet FGSM fools the network just as often: no Hessian says how near a boundary is;
- that this holds elsewhere. The intervals are over seeds only; for other data or networks, run it on those;
- what happens farther away: the Hessian is measured at the digits, and a perturbed digit is not there.
"""

import argparse
import logging
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from experiments.over_seeds import Estimate
from experiments.training import RADIUS, fgsm, input_gradient_of_loss
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import InputHessianMonitor, load_records

STRENGTHS = {"none": 0.0, "weight_decay": 0.3, "gradient_penalty": 0.05, "input_noise": 0.2, "dropout": 0.3}
CURVATURES = {
    "lambda_max": "largest λ",
    "spectral_norm": "max |λ|",
    "gradient_norm": "‖g‖",
    "normalized_curvature": "max |λ| / ‖g‖",
}
ACCURACIES = {"clean": "accuracy", "random": "at random", "fgsm": "FGSM"}
TITLES = CURVATURES | ACCURACIES


class DigitsNetwork(LightningModule):
    """64 inputs, two hidden layers of 64, 10 classes, regularized in one way."""

    def __init__(self, regularization: str, strength: float) -> None:
        super().__init__()
        self.strengths = dict.fromkeys(STRENGTHS, 0.0) | {regularization: strength}
        p = self.strengths["dropout"]
        self.net = nn.Sequential(
            nn.Linear(64, 64), nn.GELU(), nn.Dropout(p), nn.Linear(64, 64), nn.GELU(), nn.Dropout(p), nn.Linear(64, 10)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, 10]`` of digits ``[N, 64]``."""
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy, with what is added to inputs or loss."""
        x, y = batch
        x = x + self.strengths["input_noise"] * torch.randn_like(x)
        loss = cross_entropy(self(x), y)
        if self.strengths["gradient_penalty"]:
            gradient = input_gradient_of_loss(self, x, y, create_graph=True)
            loss = loss + self.strengths["gradient_penalty"] * gradient.square().sum(1).mean()
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Accuracy on the held-out digits and around them."""
        x, y = batch
        signs = torch.randint(2, x.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        moved = {"clean": x, "random": x + RADIUS * signs, "fgsm": fgsm(self, x, y, RADIUS)}
        for name, near in moved.items():
            self.log(f"accuracy/{name}", (self(near).argmax(1) == y).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=self.strengths["weight_decay"])


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,297 digits to train on and 500 held out, in [0, 1], the same ones every time."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return TensorDataset(x[order[:-500]], y[order[:-500]]), TensorDataset(x[order[-500:]], y[order[-500:]])


def trained(regularization: str, strength: float, seed: int, epochs: int, log_dir: str) -> dict[str, float]:
    """Trains and measures one network, with a TensorBoard run of its own; what it has come to."""
    seed_everything(seed, verbose=False)
    train, held_out = digits()
    logger = TensorBoardLogger(log_dir, name=regularization, version=f"seed_{seed}")
    measured_after = {0, epochs // 4, epochs // 2, epochs - 1}
    monitor = InputHessianMonitor("label", "logit", samples=held_out, num_samples=64, epochs=measured_after)
    trainer = Trainer(
        max_epochs=epochs,
        logger=logger,
        callbacks=[monitor],
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=10,
    )
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    trainer.fit(DigitsNetwork(regularization, strength), loader, DataLoader(held_out, batch_size=500))
    *_, record = load_records(logger.log_dir)
    curvature = {name: float(np.nanmean(getattr(record, name))) for name in CURVATURES}
    return curvature | {name: float(trainer.callback_metrics[f"accuracy/{name}"]) for name in ACCURACIES}


Results = dict[str, dict[str, np.ndarray]]  # by setting and quantity, one value for each seed


def table(results: Results) -> str:
    """Means with standard errors, and how each differs from no regularization."""
    lines = ["", " " * 16 + "".join(f"{title:>17}" for title in TITLES.values())]
    for setting, columns in results.items():
        cells = (Estimate.of(columns[name]) for name in TITLES)
        lines.append(f"{setting:16}" + "".join(f"{f'{cell.mean:.3f} ± {cell.error:.3f}':>17}" for cell in cells))
    lines += ["", "Against no regularization, 95 % intervals of differences of the same seed:"]
    for setting, columns in list(results.items())[1:]:
        for name, title in TITLES.items():
            change = Estimate.of(columns[name] - results["none"][name])
            low, high = change.interval
            verdict = change.verdict("lower", "higher", "not distinguishable")
            lines.append(f"  {setting:18}{title:16}{low:+.3f} to {high:+.3f}  {verdict}")
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """A dot for each seed, and the mean with its standard error; curvature beside accuracy."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained", sharey=True)
    colors = {"clean": "black", "random": "#2166ac", "fgsm": "#b2182b"}
    panels = [("spectral_norm",), ("normalized_curvature",), tuple(ACCURACIES)]
    for axis, names in zip(axes, panels, strict=True):
        for offset, name in enumerate(names):
            for place, columns in enumerate(results.values()):
                height, values, color = place + 0.22 * offset, columns[name], colors.get(name, "black")
                mean = Estimate.of(values)
                axis.plot(values, np.full(len(values), height), "o", color=color, alpha=0.25, markersize=4)
                label = None if place else TITLES[name]
                axis.errorbar(mean.mean, height, xerr=mean.error, fmt="D", color=color, capsize=4, label=label)
    axes[0].set(xlabel="max |λ|  (logit / pixel unit²)", title="Curvature of the label's logit")
    axes[1].set(xlabel="max |λ| / ‖g‖  (1 / pixel unit)", title="Normalized curvature")
    axes[2].set(xlabel="accuracy", title=f"Moved by {RADIUS:g} per pixel", xlim=(0, 1.03))
    axes[0].set_yticks(range(len(results)), [setting.replace("_", " ") for setting in results])
    axes[0].invert_yaxis()
    axes[2].legend(fontsize=8, loc="upper center")
    for axis in axes[:2]:
        axis.set_xlim(left=0)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def strength(text: str) -> tuple[str, float]:
    """``name=value`` of the command line."""
    name, value = text.split("=")
    if name not in STRENGTHS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(STRENGTHS)}.")
    return name, float(value)


def main() -> None:
    """Trains all, prints the table, draws it, and says how to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--strength", type=strength, action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--log-dir", default="regularization_logs")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.pytorch")  # about workers, which so few digits do not need
    torch.set_num_threads(1)  # as fast as several, for so small a network, and undisturbed by other programs

    results: Results = {}
    for setting, value in (STRENGTHS | dict(args.strength)).items():
        runs = [trained(setting, value, seed, args.epochs, args.log_dir) for seed in range(args.seeds)]
        results[setting] = {name: np.array([run[name] for run in runs]) for name in runs[0]}
    print(f"Held-out accuracy: {results['none']['clean'].mean():.1%} without regularization")
    print(table(results))
    path = Path(args.log_dir) / "regularization.png"
    draw(results, path)
    print(
        f"\nPicture: {path}\nEvery run: .venv/bin/tensorboard --logdir {args.log_dir}, then open the tab Input Hessian"
    )


if __name__ == "__main__":
    main()
