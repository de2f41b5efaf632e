"""Models as people train them: after a real fit, the record agrees with float64 finite differences."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from support.mode_agreement import modes_agree
from support.training import fit, small_monitor, whole_hessians
from support.zoo import (
    Bent,
    Casting,
    Checkpointed,
    Encoder,
    Forces,
    Fourier,
    InPlace,
    Learner,
    Moved,
    OwnKernel,
    Recurrent,
    Swish,
    Texts,
    bert,
    bert_after_embeddings,
    cnn,
    compiled,
    convnext,
    images,
    logits,
    masked,
    normed,
    plain_cnn,
    resnet,
    rows,
    vit,
)
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from lightning_hessian import Record, input_hessian, input_spectrum, load_records
from lightning_hessian.model.function import ModelFunction
from lightning_hessian.model.prepare import prepare

F64 = torch.float64
CLASSES = [2, 3]
STEP = 1e-5
TABLE = Path(__file__).parent.parent / "docs" / "models.md"

# Relative to the largest entry. Of central differences of the gradient: rounding, eps/STEP = 2e-11 times the ratio of
# gradient to Hessian, and STEP² = 1e-10 times that of the fourth derivative to the second. Of a Hessian in float32:
# eps = 1.2e-7 for each of some hundred operations in a row.
TOLERANCES = {"float64": 1e-6, "float32": 2e-5}


def identity(net: nn.Module) -> nn.Module:
    return net


@dataclass(frozen=True)
class Case:
    """A model, how it is trained and how it is looked at.

    Attributes:
        name: as in the table of docs/models.md.
        make: a fresh network.
        data: the data set of some digits.
        dressed: the network as it is trained: compiled, scripted.
        wrt: the layer whose output is the variable, where that is not the input.
        after: then, from the network, the variable and the inputs to the outputs.
        warning: what the monitor warns of, or None.
        reference: with the same weights, the same function in a form that plain autograd differentiates in float64.
        precision: ``"float32"`` where the forward computes in it whatever it is given.
    """

    name: str
    make: Callable[[], nn.Module]
    data: Callable[[int, int], Dataset] = images
    dressed: Callable[[nn.Module], nn.Module] = identity
    wrt: str | None = None
    after: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None
    warning: str | None = None
    reference: Callable[[], nn.Module] | None = None
    precision: str = "float64"


PIECEWISE_LINEAR = "the network is piecewise linear"
NOT_FLOAT64 = "cannot be evaluated in float64"
EMBEDDINGS = {"data": Texts, "wrt": "net.bert.embeddings", "after": bert_after_embeddings}
INSIDE = {"precision": "float32"}

CASES = [
    Case("transformers ViT, sdpa", lambda: vit("sdpa")),
    Case("transformers ViT, eager", lambda: vit("eager"), reference=lambda: vit("sdpa"), **INSIDE),
    Case("transformers ResNet (ReLU)", lambda: resnet("relu"), warning=PIECEWISE_LINEAR),
    Case("transformers ResNet with GELU", lambda: resnet("gelu")),
    Case("transformers ConvNext", convnext),
    Case("transformers BERT at its embeddings, sdpa", lambda: bert("sdpa"), **EMBEDDINGS),
    Case("transformers BERT at its embeddings, eager", lambda: bert("eager"), **EMBEDDINGS),
    Case("nn.TransformerEncoder", Encoder, rows),
    Case("attention under its own sdpa_kernel", OwnKernel, rows),
    Case("nn.LSTM", lambda: Recurrent(nn.LSTM), rows),
    Case("nn.GRU, bidirectional", lambda: Recurrent(nn.GRU, bidirectional=True), rows),
    Case("CNN, batch norm, ReLU", lambda: cnn(nn.ReLU(), nn.BatchNorm2d(4)), warning=PIECEWISE_LINEAR),
    Case("CNN, batch norm, GELU", lambda: cnn(nn.GELU(), nn.BatchNorm2d(4))),
    Case("CNN, group norm, GELU", lambda: cnn(nn.GELU(), nn.GroupNorm(2, 4))),
    Case("weight_norm and spectral_norm", normed),
    Case("torch.compile", plain_cnn, dressed=compiled),
    Case("torch.jit.script of the module", plain_cnn, dressed=torch.jit.script),
    Case("torch.jit.script of a function in the forward", lambda: cnn(Bent(), nn.Identity())),
    Case("activation checkpointing", lambda: Checkpointed(False)),
    Case("activation checkpointing, reentrant", lambda: Checkpointed(True), reference=lambda: Checkpointed(False)),
    Case("autograd.Function of the old form", lambda: cnn(Swish(), nn.Identity())),
    Case("x.mul_(2) and inplace=True", InPlace, reference=lambda: InPlace(in_place=False)),
    Case("torch.autograd.grad in the forward", Forces),
    Case("complex weights (FNO)", Fourier, reference=lambda: Fourier(torch.complex128)),
    Case("net.to(x.device) in the forward", Moved),
    Case("x.float() in the forward", Casting, warning=NOT_FLOAT64, reference=lambda: Casting(cast=False), **INSIDE),
]


@dataclass(frozen=True)
class Fitted:
    """What a fit left: the trained module, the samples, the last record, and the Hessian it should hold."""

    case: Case
    module: Learner
    x: Tensor
    record: Record
    expected: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """In which it was measured."""
        return getattr(torch, str(self.record.eigenvalues.dtype))

    @property
    def how(self) -> dict:
        """How the model is looked at without a Trainer."""
        return {"wrt": self.case.wrt, "forward_fn": masked if self.case.wrt else None}


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def fitted(request, tmp_path_factory) -> Iterator[Fitted]:
    case, folder = request.param, tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    torch.compiler.reset()
    module = Learner(case.dressed(case.make()))
    dicts = {"input_fn": lambda batch: (batch["input_ids"], batch["labels"]), "forward_fn": masked}
    monitor = small_monitor(dtype="float64", heatmap_samples=2, wrt=case.wrt, **(dicts if case.wrt else {}))
    warns = pytest.warns(UserWarning, match=case.warning) if case.warning else contextlib.nullcontext()
    with warns:
        fit(folder, monitor, model=module, train=case.data(0, 64), held_out=case.data(64, 80), max_epochs=1)
    record = load_records(folder)[-1]
    assert record.step == 4
    held_out = case.data(64, 66)
    batch = default_collate([held_out[n] for n in range(2)])
    x = batch["input_ids"] if case.wrt else batch[0]
    return Fitted(case, module, x, record, hessian_by_differences(case, module.net, x, record.target))


def hessian_by_differences(case: Case, net: nn.Module, x: Tensor, target: str) -> Tensor:
    """Central differences of the gradient ``[N, K, D, D]`` by a fresh copy of the network in float64."""
    plain = (case.reference or case.make)()
    plain.load_state_dict(getattr(net, "_orig_mod", net).state_dict())
    plain.double().eval()
    point, after = x.double(), lambda z, inputs: logits(plain(z))
    if case.after:
        with torch.no_grad():
            point, after = plain.bert.embeddings(x), lambda z, inputs: case.after(plain, z, inputs)
    return torch.stack([differences(after, point[n], x[n : n + 1], target) for n in range(len(x))])


def differences(outputs: Callable[[Tensor, Tensor], Tensor], x: Tensor, inputs: Tensor, target: str) -> Tensor:
    """The same at one sample, ``[K, D, D]``."""
    shifts = STEP * torch.eye(x.numel(), dtype=F64).reshape(-1, *x.shape)
    ends = torch.cat([x + shifts, x - shifts]).requires_grad_()
    z = outputs(ends, inputs.expand(len(ends), *inputs.shape[1:]))
    values = {"logit": z, "prob": z.softmax(1)}[target]
    slopes = [torch.autograd.grad(values[:, k].sum(), ends, retain_graph=True)[0].flatten(1) for k in CLASSES]
    above, below = torch.stack(slopes).chunk(2, dim=1)
    return (above - below) / (2 * STEP)


def all_eigenvalues(record: Record) -> np.ndarray:
    """``[N, K, D]`` descending: those listed, and the zeros that a complete spectrum leaves out."""
    assert record.complete
    rest = record.gradient.shape[-1] - record.eigenvalues.shape[-1]
    return -np.sort(-np.pad(record.eigenvalues, ((0, 0), (0, 0), (0, rest))))


def test_the_record_holds_the_hessian_of_finite_differences(fitted):
    expected, record = fitted.expected.numpy(), fitted.record
    scale = abs(expected).max(axis=(2, 3), keepdims=True)
    assert scale.all()
    tolerance = TOLERANCES[fitted.case.precision]
    assert (abs(whole_hessians(record, len(expected)) - expected) / scale).max() < tolerance
    # An eigenvalue moves by no more than the norm of what a matrix is changed by (Weyl).
    found, size = all_eigenvalues(record), expected.shape[-1]
    assert (abs(found - np.linalg.eigvalsh(expected)[..., ::-1]) / scale[..., 0]).max() < size * tolerance


def test_float32_is_the_same_to_its_rounding(fitted):
    x = fitted.x if fitted.case.wrt else fitted.x.float()
    found = input_hessian(fitted.module, x, CLASSES, fitted.record.target, dtype=torch.float32, **fitted.how)
    scale = fitted.expected.abs().amax(dim=(2, 3), keepdim=True)
    assert found.dtype == torch.float32
    assert ((found - fitted.expected).abs() / scale).max() < TOLERANCES["float32"]


def test_lanczos_finds_the_ends_of_the_same_spectrum(fitted):
    x = fitted.x if fitted.case.wrt else fitted.x.double()
    found = input_spectrum(
        fitted.module,
        x,
        CLASSES,
        fitted.record.target,
        method="lanczos",
        num_eigenvalues=4,
        dtype=fitted.dtype,
        **fitted.how,
    )
    true = torch.linalg.eigvalsh(fitted.expected).flip(-1)
    scale = fitted.expected.abs().amax(dim=(2, 3)).unsqueeze(-1)
    ends = torch.cat([true[..., :2], true[..., -2:]], dim=-1)
    allowed = found.residuals + true.shape[-1] * TOLERANCES[fitted.case.precision] * scale
    assert found.converged.all()
    assert ((found.eigenvalues - ends).abs() <= allowed).all()


def table() -> dict[str, dict[str, str]]:
    """The rows of docs/models.md by model."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(head, cells, strict=True)) for cells in body}


def test_the_table_has_a_row_for_every_model():
    assert list(table()) == [case.name for case in CASES]


def test_the_table_says_what_happened(fitted):
    record, row = fitted.record, table()[fitted.case.name]
    network = ModelFunction(fitted.module, **fitted.how)
    with prepare(network, fitted.x, CLASSES, record.target, dtype=fitted.dtype) as prepared:
        agree, why = modes_agree(prepared.batch)
    modes = "both" if agree else "reverse_over_reverse"
    if record.method == "low_rank":
        modes = "none: C gradients"
    share = input_spectrum(fitted.module, fitted.x, CLASSES, "prob", **fitted.how).gauss_newton_share.mean()
    found = {
        "network": record.network,
        "target": record.target,
        "method": record.method,
        "autodiff modes": modes,
        "dtype": str(record.eigenvalues.dtype),
    }
    new_row = f"| {fitted.case.name} | {' | '.join(found.values())} | {share:.1f} | {why}"
    assert {name: row[name] for name in found} == found, new_row
    assert abs(float(row["Gauss-Newton share of prob"]) - share) <= 0.1, new_row
    assert modes != "reverse_over_reverse" or record.autodiff_mode == modes
