"""Does the input Hessian of an energy give the right vibrations? A water molecule against its analytic frequencies.

The energy is a function of nine coordinates: a Morse potential for each O-H bond, and a spring for the angle. A
distorted molecule is relaxed, and the Hessian of the energy is measured there. In mass-weighted coordinates, its
eigenvalues are squared frequencies, and its eigenvectors are the modes of vibration.

    python examples/molecule_modes.py

You will see three vibrations that agree with the closed form of Herzberg (1945) up to rounding, and six eigenvalues
that are zero, because translating and rotating the whole molecule costs no energy. The frequencies are also close to
the harmonic frequencies of real water, to which the three (rounded) parameters were fitted by hand. The gradient
vanishes at a minimum, so normalized curvature and linear radius are meaningless here.
"""

import argparse
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_hessian import Spectrum, input_spectrum

DEPTH, STEEPNESS, LENGTH = 5.4, 2.2, 0.9572  # of an O-H bond: eV, 1/Å, Å
STIFFNESS, ANGLE = 4.4, math.radians(104.52)  # of the angle: eV
OXYGEN, HYDROGEN = 15.9949, 1.00783  # atomic mass units
MASSES = torch.tensor([OXYGEN, HYDROGEN, HYDROGEN], dtype=torch.float64).repeat_interleave(3)
WAVENUMBER = 521.4709  # of an angular frequency of 1 √(eV / (Å² u)), in 1/cm
MEASURED = (3943, 3832, 1648)  # harmonic frequencies of real water (Benedict, Gailar and Plyler 1956)
NAMES = ("asymmetric stretch", "symmetric stretch", "bend")


def energy(weighted: Tensor) -> Tensor:
    """Energies ``[N]`` in eV of molecules O, H, H, given as √mass · position ``[N, 9]``."""
    oxygen, first, second = (weighted / MASSES.sqrt()).unflatten(1, (3, 3)).unbind(1)
    bonds = torch.stack([first - oxygen, second - oxygen], dim=1)
    lengths = bonds.norm(dim=2)
    morse = DEPTH * (1 - torch.exp(-STEEPNESS * (lengths - LENGTH))) ** 2
    angle = torch.acos((bonds[:, 0] * bonds[:, 1]).sum(1) / lengths.prod(1))
    return morse.sum(1) + STIFFNESS / 2 * (angle - ANGLE) ** 2


def relaxed() -> Tensor:
    """A distorted molecule, brought to the minimum of its energy, ``[1, 9]``."""
    distorted = torch.tensor([0.0, 0, 0, 1.1, 0.1, 0, -0.4, 0.8, 0.1], dtype=torch.float64)
    weighted = (distorted * MASSES.sqrt()).unsqueeze(0).requires_grad_()
    optimizer = torch.optim.LBFGS([weighted], max_iter=500, tolerance_grad=1e-12, tolerance_change=0,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = energy(weighted).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weighted.detach()


def analytic() -> list[float]:
    """Frequencies of a bent XY₂ molecule with stiff bonds and angle (Herzberg 1945), in 1/cm, as in ``NAMES``."""
    stretch, bend = 2 * DEPTH * STEEPNESS**2, STIFFNESS / LENGTH**2
    ratio = HYDROGEN / OXYGEN
    asymmetric = (1 + ratio * (1 - math.cos(ANGLE))) * stretch / HYDROGEN
    total = (
        (1 + ratio * (1 + math.cos(ANGLE))) * stretch / HYDROGEN
        + 2 * (1 + ratio * (1 - math.cos(ANGLE))) * bend / HYDROGEN
    )  # fmt: skip
    product = 2 * (1 + 2 * ratio) * stretch * bend / HYDROGEN**2
    root = math.sqrt(total**2 / 4 - product)
    return [WAVENUMBER * math.sqrt(squared) for squared in (asymmetric, total / 2 + root, total / 2 - root)]


@dataclass(frozen=True)
class Modes:
    """The relaxed molecule ``[1, 9]``, the spectrum of its energy, and all nine frequencies in 1/cm, descending."""

    molecule: Tensor
    spectrum: Spectrum
    frequencies: list[float]


def modes() -> Modes:
    """Relaxes and measures."""
    molecule = relaxed()
    spectrum = input_spectrum(energy, molecule, classes=0, num_eigenvalues=9)
    squared = spectrum.eigenvalues[0, 0]
    return Modes(molecule, spectrum, (WAVENUMBER * squared.abs().sqrt() * squared.sign()).tolist())


def main() -> None:
    """Prints frequencies beside the analytic ones."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    found = modes()
    spectrum, expected = found.spectrum, analytic()
    print(f"Gradient {spectrum.gradient_norm.item():.1e}, diagnosis: {spectrum.diagnosis.message}")
    print(f"{'':20}{'Hessian':>12}{'analytic':>12}{'measured':>10}   1/cm")
    for name, ours, theirs, real in zip(NAMES, found.frequencies, expected, MEASURED, strict=False):
        print(f"{name:20}{ours:12.4f}{theirs:12.4f}{real:10}")
    errors = [abs(a / b - 1) for a, b in zip(found.frequencies, expected, strict=False)]
    print(f"Largest relative error of a frequency: {max(errors):.1e}")
    rest = spectrum.eigenvalues[0, 0, 3:].abs().max() / spectrum.spectral_norm.max()
    print(f"Six motions without a force: |λ| up to {rest:.1e} of the largest")


if __name__ == "__main__":
    main()
