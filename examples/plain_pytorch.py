"""Watch input Hessians in a training loop of your own, without a Trainer.

A small network learns scikit-learn's 1,797 digits (8x8, D = 64); nothing is downloaded.

    python examples/plain_pytorch.py
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_hessian import InputHessianRecorder


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,500 digits to train on and 297 held out, in [0, 1]."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    return TensorDataset(x[:1500], y[:1500]), TensorDataset(x[1500:], y[1500:])


def main() -> None:
    """Trains, measures after every epoch, and says how to look."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--log-dir", default="plain_logs")
    args = parser.parse_args()

    torch.manual_seed(0)
    train, held_out = digits()
    network = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    step = 0
    with InputHessianRecorder(args.log_dir, samples=held_out, classes=[2, 3], num_samples=8) as recorder:
        recorder.measure(network, step)
        for epoch in range(5):
            for x, y in DataLoader(train, batch_size=32, shuffle=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(x), y).backward()
                optimizer.step()
                step += 1
            record = recorder.measure(network, step, epoch=epoch)
            if record is not None:  # a measurement that fails warns, and training goes on
                print(
                    f"Epoch {epoch}: largest eigenvalue {record.lambda_max.mean():.3g}, mean over samples and classes"
                )
    x, y = held_out.tensors
    print(f"Held-out accuracy: {(network(x).argmax(1) == y).float().mean():.1%}")
    print(f"To see the results: .venv/bin/tensorboard --logdir {args.log_dir}, then open the address that it prints")


if __name__ == "__main__":
    main()
