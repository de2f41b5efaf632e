"""Why is my Hessian zero? Because ReLU networks are piecewise linear. Here is what to look at instead.

Two networks that differ only in their activation learn scikit-learn's 8x8 digits. Then the Hessian of the output for
each digit's own class is measured at eight held-out digits, with respect to the 64 pixels.

    python examples/zero_hessian.py

You will see that the Hessian of the ReLU network's logits is exactly zero, not just small, and that the diagnosis says
why; that the logits of the GELU network are curved; and that the probabilities of the ReLU network are curved too, but
only because of the softmax: the Gauss-Newton share is 1.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_hessian import Spectrum, input_spectrum

CASES = (("ReLU", "logit"), ("GELU", "logit"), ("ReLU", "prob"), ("GELU", "prob"))


def digits() -> tuple[Tensor, Tensor]:
    """All 1,797 digits, in [0, 1], and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def trained(activation: str, x: Tensor, y: Tensor) -> nn.Module:
    """A network of two hidden layers that has learned these digits."""
    torch.manual_seed(0)
    act = getattr(nn, activation)
    network = nn.Sequential(nn.Linear(64, 64), act(), nn.Linear(64, 64), act(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network


def report(name: str, spectrum: Spectrum) -> None:
    """One line of numbers, and the diagnosis in words."""
    largest, share = spectrum.spectral_norm.mean(), spectrum.gauss_newton_share.mean()
    of_softmax = "no curvature to share" if largest == 0 else f"Gauss-Newton share {share:.2f}"
    print(f"\n{name}: max |λ| {largest:.4g} (mean of 8 digits), {of_softmax}, method {spectrum.method}")
    print(f"  {spectrum.diagnosis.kind}: {spectrum.diagnosis.message}")


def main() -> None:
    """Trains both networks and measures each of the cases."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    x, y = digits()
    networks = {activation: trained(activation, x[:1500], y[:1500]) for activation in ("ReLU", "GELU")}
    for activation, network in networks.items():
        print(
            f"{activation} network. Held-out accuracy: {(network(x[1500:]).argmax(1) == y[1500:]).float().mean():.1%}"
        )
    for activation, target in CASES:
        # One class for each sample, its own: as classes="label" of the callback.
        spectrum = input_spectrum(networks[activation], x[1500:1508], y[1500:1508, None], target)
        report(f"{activation}, {target}", spectrum)


if __name__ == "__main__":
    main()
