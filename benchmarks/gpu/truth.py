"""Are the numbers true on this device? Closed forms, ``torch.func.hessian`` and float64 on the CPU."""

from __future__ import annotations

import gc
import re
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import hessian, vmap

from benchmarks.gpu.suite import Suite
from benchmarks.models import ViT, cnn, frozen, mlp, problems_of, residual_relu
from lightning_hessian import input_gradient, input_hessian, input_hvp, input_spectrum
from lightning_hessian.curvature.operators.autodiff import ReverseOverReverse

DTYPES = (torch.float32, torch.float64)
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}  # relative to the largest entry
Works = dict[str, Callable[[], dict[str, Any]]]


def works(suite: Suite) -> Works:
    """Every check by name; each says with ``ok`` whether it holds."""
    device = suite.device
    found: Works = {
        "closed forms": lambda: closed_forms(device),
        "dense": lambda: dense(device),
        "lanczos": lambda: lanczos(device),
        "low_rank": lambda: low_rank(device),
        "certificate": lambda: certificate(device),
        "TF32": lambda: tf32(device),
        "recurrent networks": lambda: recurrent(device),
        "attention": lambda: attention(device),
    }
    if device.type == "cuda":
        found |= {
            "memory afterwards": lambda: memory_afterwards(device),
            "max_memory": lambda: max_memory(device),
            "synchronisation in loops": lambda: synchronisation_in_loops(device),
            "synchronisations of a measurement": lambda: synchronisations(device),
        }
    return found


def _rows(errors: dict[str, float], dtypes: dict[str, torch.dtype]) -> dict[str, Any]:
    off = {name: error for name, error in errors.items() if not error <= TOLERANCE[dtypes[name]]}
    return {"ok": not off, "errors": errors, **({"off": off} if off else {})}


def _error(found: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the largest entry of the truth."""
    found, truth = found.double().cpu(), truth.double().cpu()
    return float((found - truth).abs().max() / truth.abs().max().clamp_min(1e-300))


def closed_forms(device: torch.device) -> dict[str, Any]:
    """A quadratic form, softmax regression, an RBF unit and a network of two layers, whose Hessians are known."""
    errors, dtypes = {}, {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        x = torch.randn(3, 6, dtype=dtype).to(device)
        q = torch.randn(6, 6, dtype=dtype)
        q = (q + q.T).to(device)
        w, v, b = (torch.randn(*size, dtype=dtype).to(device) for size in ((5, 6), (5,), (5,)))
        eye = torch.eye(6, dtype=dtype, device=device)

        def softmax_truth(x: Tensor = x, w: Tensor = w) -> Tensor:
            p = (x @ w.T).softmax(1)
            return -w.T @ (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)) @ w

        def rbf_truth(x: Tensor = x, eye: Tensor = eye) -> Tensor:
            value = torch.exp(-0.3 * x.square().sum(1))
            return (0.36 * x.unsqueeze(2) * x.unsqueeze(1) - 0.6 * eye) * value[:, None, None]

        t = torch.tanh(x @ w.T + b)
        cases: dict[str, tuple[Callable[[Tensor], Tensor], str, Tensor]] = {
            "quadratic": (lambda x, q=q: 0.5 * ((x @ q) * x).sum(1), "logit", q.expand(3, 6, 6)),
            "softmax regression": (lambda x, w=w: x @ w.T, "log_prob", softmax_truth()),
            "RBF unit": (lambda x: torch.exp(-0.3 * x.square().sum(1)), "logit", rbf_truth()),
            "tanh network": (
                lambda x, w=w, v=v, b=b: torch.tanh(x @ w.T + b) @ v,
                "logit",
                w.T @ torch.diag_embed(v * -2 * t * (1 - t * t)) @ w,
            ),
        }
        for case, (model, target, truth) in cases.items():
            name = f"{case}, {str(dtype)[6:]}"
            errors[name], dtypes[name] = _error(input_hessian(model, x, 0, target)[:, 0], truth), dtype
            name = f"{case}, {str(dtype)[6:]}, eigenvalues"
            listed = input_spectrum(model, x, 0, target).eigenvalues[:, 0]
            zeros = listed.new_zeros(3, 6 - listed.shape[1])
            ours = torch.cat([listed, zeros], 1).sort(1).values
            errors[name], dtypes[name] = _error(ours, torch.linalg.eigvalsh(truth)), dtype
            name = f"{case}, {str(dtype)[6:]}, HVP"
            product = input_hvp(model, x, torch.ones(6, dtype=dtype, device=device), 0, target)
            errors[name], dtypes[name] = _error(product[:, 0], truth.sum(2)), dtype
    return _rows(errors, dtypes)


def _small_vit() -> nn.Module:
    return frozen(ViT(1, 16, 4, dim=32, depth=1))


def dense(device: torch.device) -> dict[str, Any]:
    """Whole Hessians against ``torch.func.hessian`` on the CPU in float64."""
    errors, dtypes = {}, {}
    for name, make, shape in (("MLP", mlp, (2, 784)), ("ViT", _small_vit, (2, 1, 16, 16))):
        torch.manual_seed(0)
        model, x = make(), torch.randn(shape)
        size = x[0].numel()
        exact = model.double()
        truth = vmap(hessian(lambda s, m=exact: m(s.unsqueeze(0))[0, [2, 3]]), chunk_size=1)(x.double())
        truth = truth.reshape(2, 2, size, size)
        for dtype in DTYPES:
            key = f"{name}, {str(dtype)[6:]}"
            found = input_hessian(model.to(device, dtype), x.to(device, dtype), [2, 3])
            errors[key], dtypes[key] = _error(found, truth), dtype
            model.cpu().double()
    return _rows(errors, dtypes)


def lanczos(device: torch.device) -> dict[str, Any]:
    """Both ends by Lanczos against the whole spectrum."""
    errors, dtypes = {}, {}
    for dtype in DTYPES:
        torch.manual_seed(0)
        model, x = _small_vit().to(device, dtype), torch.randn(2, 1, 16, 16).to(device, dtype)
        ours = input_spectrum(model, x, [2, 3], "log_prob", method="lanczos")
        truth = input_spectrum(model, x, [2, 3], "log_prob", method="dense")
        for name in ("lambda_max", "lambda_min", "spectral_norm"):
            key = f"{name}, {str(dtype)[6:]}"
            errors[key], dtypes[key] = _error(getattr(ours, name), getattr(truth, name)), torch.float32
        if not (ours.valid.all() and truth.valid.all()):
            raise AssertionError(ours.diagnosis.message + truth.diagnosis.message)
    return _rows(errors, dtypes)


def low_rank(device: torch.device) -> dict[str, Any]:
    """Complete spectra of a ReLU network against ``eigvalsh`` of ``torch.func.hessian`` on the CPU, in float64."""
    torch.manual_seed(0)
    model = frozen(nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))).double()
    x = torch.randn(3, 48, dtype=torch.float64)
    truth = torch.linalg.eigvalsh(vmap(hessian(lambda s: model(s.unsqueeze(0)).softmax(1)[0, 2]))(x))
    errors, dtypes = {}, {}
    for dtype in DTYPES:
        found = input_spectrum(model.to(device, dtype), x.to(device, dtype), 2, "prob", method="low_rank")
        model.cpu().double()
        listed = found.eigenvalues[:, 0]
        ours = torch.cat([listed, listed.new_zeros(3, 48 - listed.shape[1])], 1).sort(1).values
        errors[str(dtype)[6:]], dtypes[str(dtype)[6:]] = _error(ours, truth), dtype
    return _rows(errors, dtypes)


class _Lying(torch.autograd.Function):
    """x³ whose derivative says 2 x²: a custom kernel that is wrong."""

    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        return 2 * x**2 * gradient


def certificate(device: torch.device) -> dict[str, Any]:
    """Networks that are right are certified, in both precisions; a lying function and a forward with noise are not."""
    torch.manual_seed(0)
    rows, ok = {}, True
    for name, make, shape in (
        ("CNN", cnn, (2, 1, 28, 28)),
        ("residual ReLU network", residual_relu, (2, 3, 32, 32)),
        ("ViT", _small_vit, (2, 1, 16, 16)),
    ):
        for dtype in DTYPES:
            model, x = make().to(device, dtype), torch.randn(shape).to(device, dtype)
            found = input_spectrum(model, x, 2, "prob", method="low_rank" if "ReLU" in name else "lanczos")
            rows[f"{name}, {str(dtype)[6:]}"] = float(found.finite_difference_error.max())
            ok &= bool(found.valid.all())
    x = torch.randn(2, 5, device=device)
    for name, wrong in (
        ("lying function", lambda x: _Lying.apply(x).sum(1)),
        ("noise", lambda x: (x * x).sum(1) + torch.randn(len(x), device=x.device)),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rows[name] = "not valid" if not input_spectrum(wrong, x, 0).valid.any() else "valid"
        ok &= rows[name] == "not valid"
    return {"ok": ok, "finite_difference_error": rows}


def tf32(device: torch.device) -> dict[str, Any]:
    """With TF32 allowed outside, a measurement computes without, and leaves the switches as they were."""
    torch.manual_seed(0)
    model, x = cnn(), torch.randn(2, 1, 28, 28)
    truth = input_hvp(model.double(), x.double(), torch.ones(784, dtype=torch.float64), 2, "prob")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    try:
        model = model.float().to(device)
        found = input_hvp(model, x.to(device), torch.ones(784, device=device), 2, "prob")
        kept = (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    error = _error(found, truth)
    return {"ok": kept and error <= 1e-4, "error": error, "switches_kept": kept}


class _Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(4, 16, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


def recurrent(device: torch.device) -> dict[str, Any]:
    """RNN, GRU and LSTM, whose cuDNN kernels have no second derivative, against float64 on the CPU."""
    errors, dtypes = {}, {}
    for kind in (nn.RNN, nn.GRU, nn.LSTM):
        torch.manual_seed(0)
        model, x = _Recurrent(kind).double(), torch.randn(2, 5, 4)
        truth = input_hessian(model, x.double(), 1, "prob")
        name = kind.__name__
        errors[name], dtypes[name] = (
            _error(input_hessian(model.float().to(device), x.to(device), 1, "prob"), truth),
            (torch.float32),
        )
    return {**_rows(errors, dtypes), "cudnn_enabled_afterwards": torch.backends.cudnn.enabled}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


def attention(device: torch.device) -> dict[str, Any]:
    """A transformer layer, whose flash kernels have no second derivative, against float64 on the CPU."""
    torch.manual_seed(0)
    model, x = _Attention().double().eval(), torch.randn(2, 5, 16)
    truth = input_hessian(model, x.double(), 1, "prob")
    found = input_hessian(model.float().to(device), x.to(device), 1, "prob")
    return _rows({"layer": _error(found, truth)}, {"layer": torch.float32})


def _measurements(device: torch.device) -> dict[str, Callable[[], object]]:
    torch.manual_seed(0)
    vit, relu = ViT(3, 32, 4).to(device).eval(), residual_relu().to(device)
    x = torch.randn(4, 3, 32, 32, device=device)
    small = _small_vit().to(device)
    return {
        "dense": lambda: input_hessian(small, torch.ones(2, 1, 16, 16, device=device), [2, 3]),
        "lanczos": lambda: input_spectrum(vit, x, 3, method="lanczos"),
        "low_rank": lambda: input_spectrum(relu, x, 3, "prob"),
        "gradient": lambda: input_gradient(vit, x, 3),
    }


def memory_afterwards(device: torch.device) -> dict[str, Any]:
    """Bytes of CUDA memory that are still taken after a measurement whose result was dropped."""
    left = {}
    for name, work in _measurements(device).items():
        work()  # what libraries keep
        gc.collect()
        before = torch.cuda.memory_allocated()
        work()
        gc.collect()
        left[name] = torch.cuda.memory_allocated() - before
    return {"ok": not any(left.values()), "bytes_left": left}


def max_memory(device: torch.device) -> dict[str, Any]:
    """Peak memory of measurements with a limit, beside what was there before."""
    torch.manual_seed(0)
    model, x = ViT(3, 32, 4).to(device).eval(), torch.randn(16, 3, 32, 32, device=device)
    rows, ok = {}, True
    for name, limit, work in (
        ("lanczos", 2**28, lambda m: input_spectrum(model, x, [1, 2, 3], method="lanczos", max_memory=m)),
        ("dense", 2**30, lambda m: input_hessian(model, x[:2], [1, 2, 3], max_memory=m)),
        ("dense spectrum", 2**31, lambda m: input_spectrum(model, x[:2], [1, 2], method="dense", max_memory=m)),
    ):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work(limit)
        peak = torch.cuda.max_memory_allocated() - before
        rows[name] = {"max_memory": limit, "peak": peak}
        ok &= peak <= limit
    return {"ok": ok, **rows}


def synchronisation_in_loops(device: torch.device) -> dict[str, Any]:
    """HVPs in a loop, where a synchronisation with the GPU raises."""
    torch.manual_seed(0)
    model, x = ViT(3, 32, 4).to(device).eval(), torch.randn(4, 3, 32, 32, device=device)
    autodiff = ReverseOverReverse(problems_of(model, x, [3]))
    v = torch.randn(4, 1, 3072, device=device)
    autodiff.hvp(v)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            v = autodiff.hvp(v)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def synchronisations(device: torch.device) -> dict[str, Any]:
    """How often whole measurements wait for the GPU, by the places in the package that do."""
    rows = {}
    for name, work in _measurements(device).items():
        work()
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        places = Counter(
            re.sub(r".*lightning_hessian/", "", w.filename) + f":{w.lineno}"
            for w in heard
            if "synchroniz" in str(w.message)
        )
        rows[name] = {"all": sum(places.values()), "places": dict(places.most_common(12))}
    return rows
