"""Can the monitor be configured without code? LightningCLI with a YAML file: see lightning_cli.yaml next to this file.

The MLP of digits_mlp.py learns scikit-learn's 8x8 digits. This program does not mention the monitor.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml --trainer.max_epochs 2

You will see the curves of the run in TensorBoard; the whole configuration, with the monitor's defaults, is saved next
to them as config.yaml. To list the arguments of the monitor:

    python examples/lightning_cli.py fit --trainer.callbacks.help lightning_hessian.InputHessianMonitor
"""

from digits_mlp import DigitsMLP, loaders
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import LightningCLI
from torch.utils.data import DataLoader


class Digits(LightningDataModule):
    """1,500 digits to train on and 297 held out."""

    def train_dataloader(self) -> DataLoader:
        """Shuffled, 32 at a time."""
        return loaders()[0]

    def val_dataloader(self) -> DataLoader:
        """All at once."""
        return loaders()[1]


def main() -> None:
    """Does what the command line says."""
    cli = LightningCLI(DigitsMLP, Digits, seed_everything_default=0)
    metrics = cli.trainer.callback_metrics
    for tag in sorted(tag for tag in metrics if tag.startswith("hessian_lambda")):
        print(f"{tag} {metrics[tag]:.4g}")
    print(f"Held-out accuracy: {metrics['val_accuracy']:.1%}")
    print(
        f"To see the results: .venv/bin/tensorboard --logdir {cli.trainer.logger.save_dir}, then open the address that "
        f"it prints"
    )


if __name__ == "__main__":
    main()
