"""What a user's typed code does with the package: ``mypy --strict`` checks it against the installed wheel.

Each mistake is marked with what mypy must say of it; a mark without a mistake is an error, too. Nothing here runs.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from lightning_hessian import (
    ConfigurationError,
    InputHessianMonitor,
    InputHessianRecorder,
    KeepMatrices,
    MeasurementError,
    Record,
    Spectrum,
    input_gradient,
    input_hessian,
    input_hessian_operator,
    input_hvp,
    input_spectrum,
    load_records,
    plot_hessian,
    plot_input,
    plot_spectrum,
    to_dataframe,
    write_report,
)


def difference(outputs: Tensor, classes: Tensor) -> Tensor:
    """A target of one's own."""
    return outputs.gather(1, classes) - outputs.mean(1, keepdim=True)


def callbacks() -> list[Callback]:
    """Monitors as users write them."""
    return [
        InputHessianMonitor(classes=[2, 3]),
        InputHessianMonitor(classes="label", target="prob", num_samples=4, name="prob"),
        InputHessianMonitor(classes=1, target=difference, keep_matrices=KeepMatrices(every_n=2), max_seconds=5),
        InputHessianMonitor(classes="predicted", samples=(torch.zeros(2, 3), torch.zeros(2)), wrt="embedding"),
    ]


def training(model: LightningModule) -> Trainer:
    """What a Trainer accepts."""
    return Trainer(max_epochs=1, callbacks=callbacks())


def functions(model: nn.Module, x: Tensor) -> Spectrum:
    """Each returns what its documentation says."""
    gradient: Tensor = input_gradient(model, x, classes=2)
    product: Tensor = input_hvp(model, x, gradient, classes=2, dtype=torch.float64)
    hessian: Tensor = input_hessian(model, x, classes=[2, 3], target="log_prob", chunk_size=8)
    with input_hessian_operator(model, {"image": x}, classes="predicted", wrt="image") as operator:
        column: Tensor = operator[0, 2] @ torch.ones(hessian.shape[-1])
        assert column.shape == product.shape
    return input_spectrum(model, x, classes=2, method="lanczos", num_eigenvalues=4)


def loop(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """The same in a loop of one's own."""
    recorder = InputHessianRecorder("logs", (x, labels), classes="label", num_samples=2)
    try:
        recorder.measure(model, step=1)
    except (ConfigurationError, MeasurementError) as error:
        print(error)
    recorder.close()


def records(folder: Path) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32 | np.float64]]":
    """What is read back."""
    found: Sequence[Record] = load_records(folder)
    record = found[-1]
    plot_spectrum(record, 0, 2).savefig("spectrum.png")
    plot_hessian(record, 0, "label").savefig("hessian.png")
    plot_input(record, 0).savefig("input.png")
    to_dataframe(found)
    write_report(folder, "report.html")
    print(record.summary(), record.step)
    return record.matrix(0, 2)


def mistakes(model: nn.Module, x: Tensor, record: Record) -> None:
    """All of these are reported."""
    InputHessianMonitor(classes=[2, 3], target="logits")  # type: ignore[arg-type]
    InputHessianMonitor(classes=2.5)  # type: ignore[arg-type]
    InputHessianMonitor(classes=2, every_n_epoch=1)  # type: ignore[call-arg]
    InputHessianMonitor(classes=2, num_samples="8")  # type: ignore[arg-type]
    InputHessianRecorder("logs", x, classes=2, method="exact")  # type: ignore[arg-type]
    input_hessian(model, x, classes=2, checks=True)  # type: ignore[call-arg]
    input_spectrum(model, x, classes=2, method="power")  # type: ignore[arg-type]
    input_gradient(model, x)  # type: ignore[call-arg]
    record.matrix("first", 2)  # type: ignore[arg-type]
    load_records(3)  # type: ignore[arg-type]
