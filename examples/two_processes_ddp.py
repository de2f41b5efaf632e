"""Do two processes measure the same as one? DDP on two CPU processes, checked against a single one.

The MLP of digits_mlp.py is trained by two processes, each on its own share of the digits. The monitor needs no changes:
it divides its samples among the processes, and the first one writes. Afterwards, the first process loads the weights of
the last epoch from their checkpoint, measures them alone, and compares.

    python examples/two_processes_ddp.py

You will see that the eigenvalues agree up to the rounding of float32, and that each process has the scalars.
"""

import argparse

import numpy as np
from digits_mlp import DigitsMLP, loaders
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_hessian import InputHessianMonitor, input_spectrum, load_records


def main() -> None:
    """Trains in two processes; each of them runs all of this."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="ddp_logs")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    train, held_out = loaders()
    x, y = (values[:8] for values in next(iter(held_out)))
    trainer = Trainer(
        max_epochs=5,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=TensorBoardLogger(args.log_dir),
        callbacks=[InputHessianMonitor(classes="label", target="logit", samples=(x, y))],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(DigitsMLP(), train, held_out)

    log_dir = trainer.log_dir  # a collective call of Lightning: every process asks for it, or the others wait
    tag = "hessian_lambda_max/logit_label"
    print(f"Process {trainer.global_rank}: {tag} {trainer.callback_metrics[tag]:.5f}", flush=True)
    if not trainer.is_global_zero:
        return
    *_, record = load_records(log_dir)
    model = DigitsMLP.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, map_location="cpu")
    alone = input_spectrum(model, x, y[:, None], "logit").eigenvalues.numpy()
    difference = np.abs(record.eigenvalues - alone).max() / np.abs(alone).max()
    print(f"{len(record.x)} samples on {trainer.world_size} processes, {alone.shape[-1]} eigenvalues each.")
    print(f"Largest difference to one process, of the largest eigenvalue: {difference:.1e}")
    print(f"Held-out accuracy: {trainer.callback_metrics['val_accuracy']:.1%}")
    print(f"To see the results: .venv/bin/tensorboard --logdir {args.log_dir}, then open the address that it prints")


if __name__ == "__main__":
    main()
