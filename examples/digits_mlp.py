"""What do you have to add to a Trainer? One callback. A small MLP on scikit-learn's 8x8 digits.

    python examples/digits_mlp.py

The Hessian of each digit's own logit is measured with respect to its 64 pixels, before training and after every epoch,
at 16 held-out digits. You will see that curvature is learned: max |λ| grows from almost nothing, and the radius within
which the network is roughly linear shrinks. The strongest curvature is downwards (λ_min): along that direction, a
digit's own logit bends down to both sides. Curves, spectra and heatmaps are in TensorBoard.
"""

import argparse

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import InputHessianMonitor, load_records


class DigitsMLP(LightningModule):
    """An ordinary module: nothing in it is for the callback."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[N, 10]`` of digits ``[N, 64]``."""
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Accuracy on the held-out digits."""
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def loaders() -> tuple[DataLoader, DataLoader]:
    """1,500 digits to train on and 297 held out, in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels))
    train, held_out = TensorDataset(*data[:1500]), TensorDataset(*data[1500:])
    return DataLoader(train, batch_size=32, shuffle=True), DataLoader(held_out, batch_size=297)


def main() -> None:
    """Trains, measures, and says how to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="digits_logs")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    monitor = InputHessianMonitor(classes="label", target="logit", num_samples=16)
    trainer = Trainer(
        max_epochs=8,
        logger=TensorBoardLogger(args.log_dir),
        callbacks=[monitor],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(DigitsMLP(), *loaders())

    for record in load_records(trainer.log_dir):
        down, up, radius = record.lambda_min.mean(), record.lambda_max.mean(), record.linear_radius.mean()
        print(f"Step {record.step:3}: eigenvalues from {down:6.2f} to {up:.2f}, linear radius {radius:.2f} (means)")
    print(f"Held-out accuracy: {trainer.callback_metrics['val_accuracy']:.1%}")
    print(f"To see the results: .venv/bin/tensorboard --logdir {args.log_dir}, then open the address that it prints")


if __name__ == "__main__":
    main()
