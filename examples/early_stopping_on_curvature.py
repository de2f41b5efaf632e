"""When should training stop if the network is to stay smooth? Early stopping on a curvature that the monitor logs.

The monitor's scalars are metrics like any others: Lightning's EarlyStopping and ModelCheckpoint can watch them. The MLP
of digits_mlp.py is trained twice from the same weights on the same batches: for 20 epochs, and until its linear radius
falls below 2.5. That is the distance from a digit (pixels range from 0 to 1) at which the network's second-order term
may be as large as its first-order term; a saliency map is meaningful only well within it.

    python examples/early_stopping_on_curvature.py

You will see that curvature keeps growing after accuracy has leveled off: the network that was stopped early is as
accurate, within the standard error over 297 digits, and its logits are about half as curved.
"""

import argparse

from digits_mlp import DigitsMLP, loaders
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hessian import InputHessianMonitor, load_records

SMALLEST_RADIUS = 2.5
NUM_EPOCHS = 20


def fit(log_dir: str, name: str, *stopping: Callback) -> Trainer:
    """One run, always from the same weights on the same batches."""
    seed_everything(0, verbose=False)
    # The tag that EarlyStopping asks for holds the target, which "auto" would choose only once training has begun.
    monitor = InputHessianMonitor(classes="label", target="logit", num_samples=16, heatmap_samples=0)
    trainer = Trainer(
        max_epochs=NUM_EPOCHS,
        logger=TensorBoardLogger(log_dir, name=name),
        callbacks=[monitor, *stopping],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(DigitsMLP(), *loaders())
    return trainer


def main() -> None:
    """Trains with and without early stopping, and compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="stopping_logs")
    args = parser.parse_args()

    stopping = EarlyStopping(
        "hessian_linear_radius/logit_label",
        mode="max",
        divergence_threshold=SMALLEST_RADIUS,  # "worse than this", which for mode="max" is "smaller"
        patience=NUM_EPOCHS,  # the radius gets worse from the start, which alone is no reason to stop
        verbose=True,  # says why it stops
    )
    runs = {"stopped early": fit(args.log_dir, "stopped", stopping), "to the end": fit(args.log_dir, "whole")}
    for name, trainer in runs.items():
        record, accuracy = load_records(trainer.log_dir)[-1], float(trainer.callback_metrics["val_accuracy"])
        error = (accuracy * (1 - accuracy) / 297) ** 0.5
        print(
            f"{name:14}{trainer.current_epoch:3} epochs. Held-out accuracy: {accuracy:.1%} ± {error:.1%}, "
            f"linear radius {record.linear_radius.mean():.2f}, max |λ| {record.spectral_norm.mean():.1f}"
        )
    print(f"To see the results: .venv/bin/tensorboard --logdir {args.log_dir}, then open the address that it prints")


if __name__ == "__main__":
    main()
