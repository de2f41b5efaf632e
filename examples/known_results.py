"""Are published results on input curvature reproduced here? CURE, low-curvature networks, softplus, softmax.

Small networks are trained from several seeds on 4,000 MNIST digits, averaged to 14x14 pixels (D = 196) so that whole
spectra are cheap. Only the direction of each effect is compared: numbers depend on data and network, and these
are far smaller than those of the papers. Each verdict is computed from a 95 % interval over seeds, and may be "not
seen". The training methods are in experiments/training.py, the statistics in experiments/over_seeds.py.

    python examples/known_results.py                  # known_results.md and its pictures; several minutes
    python examples/known_results.py --quick          # far too little data, only to see that it runs
    python examples/known_results.py --output docs    # the page of the documentation
"""

import argparse
import copy
import inspect
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import matplotlib.pyplot as plt
import mnist_cnn
import numpy as np
import torch
from experiments import training
from experiments.over_seeds import Claim, Result
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, cross_entropy

from lightning_hessian import Spectrum, __version__, input_spectrum

BETAS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
STEEPNESS = "max |λ| / ‖g‖"
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    """How much is trained and measured."""

    seeds: int = 5
    epochs: int = 5
    num_train: int = 4000
    num_attacked: int = 500
    num_measured: int = 64
    looks: tuple[int, ...] = (0, 1, 3, 8, 24)  # epochs after which the fourth result is measured


class Digits:
    """Digits to train on and digits held out, 14x14 pixels."""

    def __init__(self, size: Size) -> None:
        self.size = size
        (x, self.y), (x_test, self.y_test) = (data.tensors for data in mnist_cnn.digits())
        self.x, self.x_test = avg_pool2d(x, 2), avg_pool2d(x_test, 2)

    def fit(self, model: nn.Module, epochs: int, loss: Loss) -> nn.Module:
        """Adam on batches of 64."""
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        model.train()
        for _ in range(epochs):
            for batch in torch.randperm(self.size.num_train).split(64):
                optimizer.zero_grad()
                loss(model, self.x[batch], self.y[batch]).backward()
                optimizer.step()
        return model.eval()

    def accuracies(self, model: nn.Module) -> dict[str, float]:
        """On held-out digits, and under ten steps of projected gradient descent."""
        n = self.size.num_attacked
        near = {"accuracy": self.x_test, "attacked": training.attacked(model, self.x_test[:n], self.y_test[:n], 10)}
        return {name: float((model(x).argmax(1) == self.y_test[: len(x)]).float().mean()) for name, x in near.items()}

    def spectrum(self, model: nn.Module, target: str) -> Spectrum:
        """Of held-out digits, each for its label."""
        n = self.size.num_measured
        return input_spectrum(model, self.x_test[:n], self.y_test[:n], target)


def curvature_regularization(digits: Digits, size: Size) -> tuple[Result, Figure]:
    """CURE and adversarial training lower the largest curvature of the loss.

    S.-M. Moosavi-Dezfooli, A. Fawzi, J. Uesato and P. Frossard, *Robustness via curvature regularization, and vice
    versa*, CVPR 2019: adversarial training lowers the curvature of the loss with respect to the input, and conversely,
    a penalty on that curvature (CURE) makes networks robust.

    A GELU network is trained, and then trained for as long again in three ways: as before; on digits attacked within
    0.1 per pixel; and with CURE's penalty ‖∇ℓ(x + hz) − ∇ℓ(x)‖², where z is the unit vector along the gradient's sign.
    Unlike in the paper, h does not grow during training. The paper estimates curvature from finite steps, which cross
    the kinks of its ReLU networks; here it is the Hessian at the digit. *Attacked* is the accuracy after ten steps of
    projected gradient descent within 0.1 per pixel.
    """
    result, profiles = Result(), {}
    for seed in range(size.seeds):
        torch.manual_seed(seed)
        start = digits.fit(training.cnn(nn.GELU), size.epochs, training.plain)
        ways = {"standard": training.plain, "CURE": training.cure, "adversarial": training.adversarial}
        for name, loss in ways.items():
            torch.manual_seed(seed)
            model = digits.fit(copy.deepcopy(start), size.epochs, loss)
            spectrum = digits.spectrum(model, "loss")
            result.add(name, {"largest λ": float(spectrum.lambda_max.mean()), **digits.accuracies(model)})
            profiles.setdefault(name, []).append(spectrum.eigenvalues[:, 0].sort().values.mean(0).numpy())
    for name in ("adversarial", "CURE"):
        result.claims += [
            Claim.lower(f"{name}: a lower largest λ than standard", *result.pair("largest λ", "standard", name)),
            Claim.gain(f"{name}: more often right when attacked", *result.pair("attacked", "standard", name)),
        ]

    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, values in profiles.items():
        axis.plot(np.mean(values, axis=0), label=name)
        axis.fill_between(range(len(values[0])), np.min(values, axis=0), np.max(values, axis=0), alpha=0.3)
    axis.set(xlabel="number of the eigenvalue", ylabel="λ (loss / pixel unit²)", title="Spectra of the loss")
    axis.set_yscale("symlog", linthresh=0.1)
    axis.legend()
    return result, figure


def low_curvature_networks(digits: Digits, size: Size) -> tuple[Result, Figure]:
    """Low-curvature networks have a lower normalized curvature at the same accuracy.

    S. Srinivas, K. Matoba, H. Lakkaraju and F. Fleuret, *Efficient training of low-curvature neural networks*, NeurIPS
    2022: centered softplus with a learned β, batch norm with a learned Lipschitz constant, and spectral normalization,
    with penalties on β and the constant (LCNN), give much lower curvature, normalized by the gradient, without loss
    of accuracy; with a penalty on the gradient as well (both), networks are also more robust.

    The network has three convolutions with batch norm; curvature is that of the loss. As in the authors' code, the
    standard network has a softplus so steep (β = 1000) that it differs from a ReLU only in its Hessian, and batch norm
    is bounded by its running variance. Unlike in the paper, the network is not residual, and the spectral norm is that
    of the kernel as a matrix, not of the convolution.
    """
    result = Result()
    settings = {
        "standard": (False, training.plain),
        "gradient penalty": (False, training.with_gradient_penalty),
        "LCNN": (True, training.low_curvature),
        "both": (True, training.with_gradient_penalty),
    }
    for seed in range(size.seeds):
        for name, (low_curvature, loss) in settings.items():
            torch.manual_seed(seed)
            model = digits.fit(training.batch_normed(low_curvature), size.epochs, loss)
            spectrum = digits.spectrum(model, "loss")
            norms = {"max |λ|": spectrum.spectral_norm, "‖g‖": spectrum.gradient_norm}
            norms = {STEEPNESS: spectrum.normalized_curvature, **norms}
            result.add(name, {key: float(norm.nanmean()) for key, norm in norms.items()} | digits.accuracies(model))
    result.claims = [
        Claim.lower("LCNN: less normalized curvature than standard", *result.pair(STEEPNESS, "standard", "LCNN")),
        Claim.lower("both: less than standard", *result.pair(STEEPNESS, "standard", "both")),
        Claim.gain("LCNN: no point less accurate", *result.pair("accuracy", "standard", "LCNN"), at_least=-1),
        Claim.gain("LCNN: more often right when attacked", *result.pair("attacked", "standard", "LCNN")),
        Claim.gain("both: more often right when attacked", *result.pair("attacked", "standard", "both")),
    ]

    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name, row in result.rows.items():
        axis.plot(row[STEEPNESS], row["accuracy"], "o", label=name, alpha=0.7)
    axis.set(xscale="log", xlabel="max |λ| / ‖g‖ of the loss (1 / pixel unit)", ylabel="held-out accuracy")
    axis.set_title("Low-curvature networks, a dot for each seed")
    axis.legend()
    return result, figure


def with_softplus(network: nn.Sequential, beta: float) -> nn.Sequential:
    """The same weights, with softplus in place of ReLU."""
    return nn.Sequential(*(nn.Softplus(beta) if isinstance(layer, nn.ReLU) else layer for layer in network))


def distance_from_scaling(network: nn.Sequential, x: Tensor, y: Tensor, beta: float) -> float:
    """How far, relatively, the spectrum at x / β with biases / β is from β times that of softplus with β = 1 at x."""
    network = copy.deepcopy(network).double()
    reference = input_spectrum(with_softplus(network, 1.0), x.double(), y)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith("bias"):
                parameter /= beta
    scaled = input_spectrum(with_softplus(network, beta), x.double() / beta, y)
    expected = beta * reference.eigenvalues
    return float((scaled.eigenvalues - expected).abs().max() / expected.abs().max())


def softplus(digits: Digits, size: Size) -> tuple[Result, Figure]:
    """ReLU logits have no Hessian; with softplus in place of ReLU, it grows with β.

    A.-K. Dombrowski, M. Alber, C. J. Anders, M. Ackermann, K.-R. Müller and P. Kessel, *Explanations can be manipulated
    and geometry is to blame*, NeurIPS 2019: softplus with a small β in place of ReLU lowers the curvature that makes
    explanations by gradients easy to manipulate. The second derivative of softplus is at most β / 4.

    A ReLU network is trained, and its ReLUs are replaced by softplus, with the same weights. The Hessian of the label's
    logit is the functional term alone. It is exactly proportional to β in one sense: softplus_β(a) = softplus₁(βa) / β,
    so with all biases divided by β, the Hessian at x / β is β times the Hessian at x for β = 1, at any depth. The mean
    over given digits grows more slowly, since fewer units are near their kink; where one is, growth is nearly
    proportional.
    """
    result, distances, zeros = Result(), [], 0
    for seed in range(size.seeds):
        torch.manual_seed(seed)
        network = digits.fit(training.cnn(nn.ReLU), size.epochs, training.plain)
        smooth = {f"β = {beta:g}": with_softplus(network, beta) for beta in BETAS}
        for name, model in {"ReLU": network, **smooth}.items():
            spectrum = digits.spectrum(model, "logit")
            norm = spectrum.spectral_norm
            result.add(name, {"mean of max |λ|": float(norm.mean()), "largest of max |λ|": float(norm.max())})
            zeros += name == "ReLU" and spectrum.diagnosis.kind == "piecewise_linear" and not norm.any()
        few = digits.x_test[:4], digits.y_test[:4]
        distances.append(max(distance_from_scaling(network, *few, beta) for beta in (3.0, 10.0, 50.0)))
    farthest = f"within {max(distances):.1g} of it, relatively"
    result.claims = [
        Claim.exact("ReLU: zero", f"exactly 0 for {zeros} of {size.seeds} seeds", zeros == size.seeds),
        Claim.exact("softplus: × β at x / β with biases / β", farthest, max(distances) < 1e-9),
    ]
    for low, high in ((1, 8), (8, 64)):
        values = result.pair("mean of max |λ|", f"β = {low}", f"β = {high}")
        result.claims.append(Claim.higher(f"softplus: more from β = {low} to {high}; in proportion, × 8", *values))

    figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
    for name in ("mean of max |λ|", "largest of max |λ|"):
        found = [result.estimate(f"β = {beta:g}", name) for beta in BETAS]
        means, errors = [each.mean for each in found], [each.error for each in found]
        axis.errorbar(BETAS, means, errors, capsize=3, label=f"{name} of {size.num_measured} digits")
    axis.plot(BETAS, [means[0] * beta for beta in BETAS], ":", color="gray", label="in proportion to β")
    axis.set(xscale="log", yscale="log", xlabel="β", ylabel="max |λ| of the logit", title="Softplus in place of ReLU")
    axis.legend()
    return result, figure


def saturating_softmax(digits: Digits, size: Size) -> tuple[Result, Figure]:
    """As the softmax saturates, the loss flattens and the logits do not.

    With p the probability of the label, both terms of the loss's Hessian, JᵀAJ with A = diag(p) − ppᵀ (Gauss–Newton)
    and Σ (p − e)∇²z (functional), vanish as 1 − p. The first grows with the square of the logits' slopes, the second
    with their curvature. For Hessians with respect to the *weights*, the first term is what remains late in
    training (L. Sagun, U. Evci, V. U. Güney, Y. Dauphin and L. Bottou, *Empirical analysis of the Hessian of
    over-parametrized neural networks*, 2017); we know of no published figure for inputs. For the inputs of ReLU
    networks, S. Singla, E. Wallace, S. Feng and S. Feizi, *Understanding impacts of high-order loss approximations and
    features in deep learning interpretation*, ICML 2019, prove that with many classes and a confident prediction, the
    loss's Hessian is nearly of rank one, and its eigenvector nearly parallel to the gradient.

    Measured at training digits, where the softmax saturates. 1 − p, λ, rank and alignment are medians over digits,
    since means would be dominated by the few that are still uncertain. Verdicts compare the last epoch with epoch 1.
    """
    result = Result()
    x, y = digits.x[: size.num_measured], digits.y[: size.num_measured]
    for seed in range(size.seeds):
        for activation in (nn.GELU, nn.ReLU):
            torch.manual_seed(seed)
            model, trained_for = training.cnn(activation), 0
            for epoch in size.looks:
                digits.fit(model, epoch - trained_for, training.plain)
                trained_for = epoch
                loss, logit = (input_spectrum(model, x, y, target) for target in ("loss", "logit"))
                with torch.no_grad():
                    probability = (-cross_entropy(model(x), y, reduction="none")).exp()
                values = {
                    "1 − p": 1 - probability.median(),
                    "λ of the loss": loss.lambda_max.median(),
                    "max |λ| of the logit": logit.spectral_norm.mean(),
                    "Gauss–Newton share": loss.gauss_newton_share.nanmean(),
                    "effective rank": loss.effective_rank.nanmedian(),
                    "alignment with g": loss.gradient_alignment.nanmedian(),
                }
                result.add(f"{activation.__name__}, epoch {epoch}", {key: float(v) for key, v in values.items()})
    share = max(abs(row["Gauss–Newton share"] - 1).max() for name, row in result.rows.items() if "ReLU" in name)
    gelu, relu = ([f"{name}, epoch {size.looks[at]}" for at in (1, -1)] for name in ("GELU", "ReLU"))
    turns, rises = "ReLU: its eigenvector turns to the gradient", "GELU: the Gauss–Newton share rises"
    result.claims = [
        Claim.lower("GELU: the loss flattens", *result.pair("λ of the loss", *gelu), "expected"),
        Claim.higher("GELU: the logit does not", *result.pair("max |λ| of the logit", *gelu), "expected"),
        Claim.higher(rises, *result.pair("Gauss–Newton share", *gelu), "expected"),
        Claim.exact("ReLU: the share is 1", f"within {share:.1g}", bool(share < 1e-6)),
        Claim.lower("ReLU: the rank falls, towards one", *result.pair("effective rank", *relu)),
        Claim.higher(turns, *result.pair("alignment with g", *relu)),
    ]

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, names in zip(axes, (("λ of the loss", "max |λ| of the logit"), ("Gauss–Newton share",)), strict=True):
        for name in names:
            found = [result.estimate(f"GELU, epoch {epoch}", name) for epoch in size.looks]
            means, errors = [each.mean for each in found], [each.error for each in found]
            axis.errorbar(size.looks, means, errors, fmt="o-", capsize=3, label=name)
        axis.set_xscale("symlog", linthresh=1)
        axis.set(xlabel="epochs", xticks=size.looks, xticklabels=size.looks)
        axis.legend()
    axes[0].set(yscale="log", title="GELU network, digits trained on")
    axes[1].set(ylim=(0, 1), title="The loss's Hessian")
    return result, figure


EXPERIMENTS = {
    each.__name__: each for each in (curvature_regularization, low_curvature_networks, softplus, saturating_softmax)
}


def run(name: str, size: Size, images: Path) -> tuple[str, Result, float]:
    """One experiment, in a process of its own: its name, what it found, and the seconds of CPU time it took."""
    torch.set_num_threads(1)  # as fast as several, for such small networks
    started = time.process_time()
    result, figure = EXPERIMENTS[name](Digits(size), size)
    figure.savefig(images / f"known_{name}.png", dpi=80)
    return name, result, time.process_time() - started


def page(results: dict[str, Result], size: Size, minutes: tuple[float, float]) -> str:
    """The page: of each experiment what its docstring says, and what it found."""
    sections = ""
    for name, experiment in EXPERIMENTS.items():
        title, _, text = (inspect.getdoc(experiment) or "").partition("\n\n")
        title = title.rstrip(".")
        sections += f"## {title}\n\n{text}\n\n{results[name].to_markdown()}\n\n![{title}](images/known_{name}.png)\n\n"
    command = " ".join(["python examples/known_results.py", *sys.argv[1:]])
    return f"""# Known results, reproduced

Do published findings about input curvature come out here? `{command}`
([code](../examples/known_results.py)) trains small networks on {size.num_train:,} MNIST digits, averaged to 14 × 14
pixels with values from 0 to 1 (D = 196). Only the **direction** of each effect is compared: numbers depend on data and
network, and these are far smaller than those of the papers.

Tables show means ± standard errors over {size.seeds} seeds. For each network, values are means over {size.num_measured}
digits, held out unless stated otherwise. Verdicts come from 95 % intervals (Student's t) of the ratio, or of the
difference in accuracy, between networks of the same seed: *as published* if the interval lies on the published side,
*opposite* if it lies on the other, *not seen* if it includes no effect. *As expected* marks what follows from formulas.
With so few seeds and so many intervals, one of them may be on either side by chance. Curvatures are in units of the
target (loss or logit) per squared pixel unit.

{sections}*This page is generated. It was made with Python {platform.python_version()}, torch {torch.__version__} and
lightning-hessian {__version__} on {platform.machine()}, {time.strftime("%Y-%m-%d")}, in {minutes[1]:.1f} minutes of CPU
time ({minutes[0]:.1f} minutes on {os.cpu_count()} cores, which other programs were using too).*
"""


def main() -> None:
    """Runs all four, prints the verdicts, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds, one epoch, few digits")
    parser.add_argument("--output", default="known_results", help="where known_results.md and images/ are written")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="experiments at a time")
    args = parser.parse_args()

    size = Size(2, 1, 2000, 100, 8, (0, 1, 2)) if args.quick else Size()
    images = Path(args.output) / "images"
    images.mkdir(parents=True, exist_ok=True)
    started, cpu_seconds, results = time.perf_counter(), 0.0, {}
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for name, result, seconds in pool.map(partial(run, size=size, images=images), EXPERIMENTS):
            results[name] = result
            cpu_seconds += seconds
            print((inspect.getdoc(EXPERIMENTS[name]) or "").splitlines()[0])
            for claim in result.claims:
                print(f"  {claim.says}: {claim.measured}, {claim.verdict}", flush=True)
    minutes = (time.perf_counter() - started) / 60, cpu_seconds / 60
    path = Path(args.output) / "known_results.md"
    path.write_text(page(results, size, minutes), encoding="utf-8")
    accuracy = results["curvature_regularization"].estimate("standard", "accuracy").mean
    print(f"\nHeld-out accuracy: {accuracy:.1%} of the first standard networks\nPage: {path}, with images/ beside it")


if __name__ == "__main__":
    main()
