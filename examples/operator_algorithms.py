"""Pass input Hessians to algorithms of other libraries: the top eigenvalue by SciPy, hessian-eigenthings and ours.

``input_hessian_operator`` represents the Hessians of all samples and classes as linear operators; no matrix is formed.
It also shows how much of the curvature comes from the softmax (the Gauss-Newton term), and the curvature along the line
between two digits.

    python examples/operator_algorithms.py
"""

import argparse

import torch
from hessian_eigenthings import LambdaOperator, lanczos
from scipy.sparse.linalg import eigsh
from sklearn.datasets import load_digits
from torch import nn

from lightning_hessian import input_hessian_operator


def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network that has learned 1,500 of scikit-learn's digits, and the others."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    network = nn.Sequential(nn.Linear(64, 64), nn.Softplus(beta=3.0), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x[:1500]), y[:1500]).backward()
        optimizer.step()
    return network, x[1500:], y[1500:]


def main() -> None:
    """Prints the same eigenvalue from three libraries, and what else products tell."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    network, x, y = trained()
    print(f"Held-out accuracy: {(network(x).argmax(1) == y).float().mean():.1%}")
    few, label = x[:4], int(y[0])
    with input_hessian_operator(network, few, label, "log_prob", dtype=torch.float64) as hessian:
        print(f"An operator of shape {hessian.shape}; class {label}, log_prob")
        first = hessian[0, label]
        values, vectors = eigsh(first.to_scipy(), k=1, which="LM")
        wrapped = LambdaOperator(first.matvec, first.shape[0], dtype=first.dtype)
        theirs = lanczos(wrapped, k=1, max_iter=40, which="LM", seed=0).eigenvalues[0]
        ours = hessian.spectrum().eigenvalues[0, 0]
        print(f"Eigenvalue of largest magnitude: SciPy {values[0]:.6f}, hessian-eigenthings {theirs:.6f}, "
              f"input_spectrum {ours[ours.abs().argmax()]:.6f}")  # fmt: skip
        v = torch.as_tensor(vectors[:, 0])
        share = (v @ (hessian.gauss_newton[0, label] @ v)) / (v @ (first @ v))
        print(f"Of the curvature along its eigenvector, {share:.0%} is that of the softmax (Gauss-Newton term)")
        trace = first.trace()
        exact = first.trace(num_vectors=64)
        print(f"Trace: {trace.value:.3f} ± {trace.error:.3f} from 32 products, {exact.value:.3f} from 64")
        line = (few[1] - few[0]).double()
        line /= line.norm()
        print(f"Curvature along the line to the next digit: {line @ (first @ line):.4f}")


if __name__ == "__main__":
    main()
