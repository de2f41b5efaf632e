"""Watch input Hessians in a loop of Lightning Fabric with bf16-mixed precision.

The network trains in bfloat16 and is measured in float32, since bfloat16 is too coarse for second derivatives. The
curves of the loss and of the curvature are in one event file: the recorder writes through Fabric's own logger.

    python examples/fabric_bf16.py
"""

import argparse

import torch
from lightning.fabric import Fabric, seed_everything
from lightning.fabric.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import InputHessianRecorder


def main() -> None:
    """Trains, measures after every epoch, and says how to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="fabric_logs")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    fabric = Fabric(devices=1, precision="bf16-mixed", loggers=TensorBoardLogger(args.log_dir, name="digits"))
    network = nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.SiLU(), nn.Conv2d(16, 32, 3), nn.SiLU(), nn.Flatten(), nn.Linear(32 * 16, 10)
    )
    network, optimizer = fabric.setup(network, torch.optim.AdamW(network.parameters(), lr=1e-3))
    loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x[:1500], y[:1500]), batch_size=32, shuffle=True))
    held_out = x[1500:], y[1500:]
    step = 0
    with InputHessianRecorder(
        samples=held_out, classes="label", target="log_prob", writer=fabric.logger.experiment
    ) as recorder:
        for epoch in range(4):
            for images, labels in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(network(images), labels)
                fabric.backward(loss)
                optimizer.step()
                fabric.log("loss", loss, step)
                step += 1
            recorder.measure(network, step, epoch=epoch)
    images, labels = (t.to(fabric.device) for t in held_out)
    print(f"Held-out accuracy: {(network(images).argmax(1) == labels).float().mean():.1%}")
    print(f"To see the results: .venv/bin/tensorboard --logdir {args.log_dir}, then open the address that it prints")


if __name__ == "__main__":
    main()
