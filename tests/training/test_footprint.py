"""Training with the monitor is training without it, bit for bit, whatever is trained and however."""

import random

import numpy as np
import pytest
import torch
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import Callback
from support.footprint_cases import Case, differing, run
from support.footprint_learners import (
    Averaged,
    Collates,
    Counts,
    Drawing,
    DrawingLogger,
    FirstOf,
    Learner,
    Logs,
    OwnStreams,
    Pack,
    Quiet,
    Transfers,
    TwoOptimizers,
    Unpacks,
    settings,
)
from support.footprint_networks import (
    STREAM,
    Attention,
    Careless,
    Checkpointed,
    Globals,
    OwnAutocast,
    Recurrent,
    Residual,
    Unmeasurable,
    cnn,
    mlp,
)
from support.training import Classifier, small_monitor
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.optim import lr_scheduler

from lightning_hessian import input_spectrum, load_records

WORKERS = {"num_workers": 2, "persistent_workers": True}


def compiled(backend: str, whole: bool = False) -> nn.Module:
    """A learner whose network, or which itself, is compiled; how often that happens and is run is counted."""
    counts = [0, 0]

    def counting(graph, inputs):
        counts[0] += 1
        run_graph = torch._dynamo.lookup_backend(backend)(graph, inputs)

        def counted(*arguments):
            counts[1] += 1
            return run_graph(*arguments)

        return counted

    model = Quiet(mlp()) if whole else Learner(torch.compile(mlp(), backend=counting))
    model.compiled = counts
    return torch.compile(model, backend=counting) if whole else model


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(12), nn.GELU(), nn.LazyLinear(10))


CASES = {
    "mlp": Case(lambda: Learner(mlp())),
    "cnn": Case(lambda: Learner(cnn(), frozen=True), monitor={"heatmap_samples": 1}),
    "cnn_relu": Case(lambda: Learner(cnn(nn.ReLU)), {"num_sanity_val_steps": 0}, monitor={"target": "prob"}),
    "lanczos": Case(
        lambda: Learner(cnn(), frozen=True), monitor={"method": "lanczos", "num_eigenvalues": 4, "density_vectors": 2}
    ),
    "residual": Case(lambda: Learner(Residual())),
    "lstm": Case(lambda: Learner(Recurrent(nn.LSTM))),
    "gru_dropout": Case(lambda: Learner(Recurrent(nn.GRU, num_layers=2, dropout=0.5))),
    "transformer": Case(lambda: Learner(Attention(padded=False))),
    "transformer_padded": Case(lambda: Learner(Attention())),
    "compiled_net_eager": Case(lambda: compiled("eager")),
    "compiled_net_aot": Case(lambda: compiled("aot_eager")),
    "compiled_module": Case(lambda: compiled("eager", whole=True)),
    "checkpoint_reentrant": Case(lambda: Learner(Checkpointed(True))),
    "checkpoint": Case(lambda: Learner(Checkpointed(False))),
    "accumulated": Case(lambda: Learner(cnn()), {"accumulate_grad_batches": 2}, monitor={"every_n_train_steps": 1}),
    "two_optimizers": Case(TwoOptimizers),
    **(
        {
            "ema_callback": Case(
                lambda: Learner(cnn()), callbacks=lambda: [lightning_callbacks.EMAWeightAveraging(decay=0.5)]
            )
        }
        if hasattr(lightning_callbacks, "EMAWeightAveraging")  # not in Lightning 2.5.0
        else {}
    ),
    "ema_module": Case(Averaged),
    "spectral_norm": Case(lambda: Learner(mlp(spectral_norm))),
    "weight_norm": Case(lambda: Learner(mlp(weight_norm))),
    "bf16_mixed": Case(lambda: Learner(cnn()), {"precision": "bf16-mixed"}),
    "bf16_true": Case(lambda: Learner(cnn()), {"precision": "bf16-true"}),
    "bf16_true_lstm": Case(lambda: Learner(Recurrent(nn.LSTM)), {"precision": "bf16-true"}),
    "64_true": Case(lambda: Learner(cnn()), {"precision": "64-true"}),
    "64_true_in_float64": Case(lambda: Learner(cnn()), {"precision": "64-true"}, monitor={"dtype": "float64"}),
    "workers": Case(lambda: Learner(cnn()), loader=WORKERS),
    "workers_no_sanity": Case(lambda: Learner(cnn()), {"num_sanity_val_steps": 0}, WORKERS),
    "clip_norm": Case(
        lambda: Learner(mlp(), scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5)), {"gradient_clip_val": 0.01}
    ),
    "clip_value": Case(
        lambda: Learner(mlp(), torch.optim.AdamW, lambda o: lr_scheduler.CosineAnnealingLR(o, 3)),
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ),
    "deterministic": Case(lambda: Learner(cnn()), {"deterministic": True}),
    "careless": Case(lambda: Learner(Careless())),
    "logs_in_forward": Case(lambda: Logs(mlp())),
    "batch_hooks": Case(Transfers, {"num_sanity_val_steps": 0}),
    "own_autocast": Case(lambda: Learner(OwnAutocast())),
    "data_module": Case(lambda: Learner(mlp()), data=OwnStreams),
    "data_module_no_sanity": Case(lambda: Learner(mlp()), {"num_sanity_val_steps": 0}, data=OwnStreams),
    "data_module_collates": Case(lambda: Learner(mlp()), {"num_sanity_val_steps": 0}, data=Collates),
    "batch_objects": Case(
        lambda: Unpacks(mlp()),
        {"num_sanity_val_steps": 0},
        {"collate_fn": Pack},
        monitor={"input_fn": lambda batch: (batch.x, batch.y)},
    ),
    "lazy": Case(lambda: Learner(lazy(), torch.optim.SGD), {"num_sanity_val_steps": 0}, monitor={"on_error": "warn"}),
    "lazy_sanity": Case(lambda: Learner(lazy(), torch.optim.SGD)),
    "global_stream": Case(lambda: Learner(Globals())),
    "barebones": Case(lambda: Quiet(mlp()), {"barebones": True, "logger": None, "log_every_n_steps": None}),
    "own_functions": Case(
        lambda: Learner(mlp()),
        monitor={
            "input_fn": lambda batch: (batch[0].mul_(0.5 + 0.1 * STREAM.random()), batch.pop()),
            "forward_fn": lambda module, x: module(x) * (1 + 0 * STREAM.random()),
        },
    ),
    "given_dataset": Case(lambda: Learner(Globals()), monitor={"samples": Drawing()}),
    "drawing_logger": Case(lambda: Learner(mlp()), {"logger": DrawingLogger()}),
    "second_callback": Case(lambda: Learner(cnn()), callbacks=lambda: [Counts()]),
    **{
        f"{mode}{sanity}": Case(lambda: FirstOf(mlp()), {"num_sanity_val_steps": sanity}, several=mode)
        for mode in ("min_size", "max_size_cycle", "max_size", "sequential")
        for sanity in (0, 2)
    },
}
FEWER = ("batch_hooks", "data_module_no_sanity", "lazy")  # no measurement before training: there are no samples yet


@pytest.fixture(autouse=True)
def _settings_come_back(monkeypatch):
    """What ``deterministic=True`` and dirty monitors leave behind."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_default_dtype(torch.float32)
    torch.set_autocast_enabled("cpu", False)
    torch.set_autocast_cache_enabled(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.enabled = torch.backends.cudnn.allow_tf32 = True
    torch.backends.mha.set_fastpath_enabled(True)


NESTED = "ignore:The PyTorch API of nested tensors is in prototype stage"  # which torch takes by itself in eval mode


@pytest.mark.filterwarnings(
    NESTED, "ignore:.*(No measurement before|lazy|Lazy|barebones|default_root_dir|No TensorBoard):UserWarning"
)
@pytest.mark.parametrize("name", CASES)
def test_nothing_is_different(tmp_path, name):
    case = CASES[name]
    monitor = small_monitor(**{"every_n_train_steps": 2, "heatmap_samples": 0, **case.monitor})
    without = run(case, tmp_path / "without")
    assert differing(without, run(case, tmp_path / "with", monitor)) == []
    assert len(load_records(tmp_path / "with")) >= (3 if name in FEWER else 4)


@pytest.mark.parametrize("target", ["auto", "logit"])
@pytest.mark.parametrize(
    ("reason", "warning"),
    [
        ("random", "random"),
        ("once", "can be trusted"),
        ("detached", "contradict the gradient at"),
        ("coupled", "changes with the other samples"),
        ("raises", "only for training"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*target='auto' measures 'prob':UserWarning")
def test_what_cannot_be_measured_warns_once_and_leaves_nothing(tmp_path, reason, warning, target):
    case = Case(lambda: Learner(Unmeasurable(reason)), {"limit_val_batches": 0})
    samples = torch.rand(2, 1, 8, 8)
    without = run(case, tmp_path / "without")
    monitor = small_monitor(target=target, samples=samples, every_n_train_steps=2, on_error="warn")
    with pytest.warns(UserWarning, match=warning) as caught:
        monitored = run(case, tmp_path / "with", monitor)
    (message,) = [str(warning.message) for warning in caught if "no measurement" in str(warning.message)]
    assert "lost in rounding" not in message  # which is not the cause
    assert differing(without, monitored) == []
    assert not (tmp_path / "with" / "input_hessian").exists()


class Dirty(Callback):
    """Does what the monitor must not do, after the first step."""

    def __init__(self, deed):
        self.deed = deed

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 1:
            self.deed(trainer, pl_module)


def shift(tensor):
    with torch.no_grad():
        tensor.add_(1e-3)


def optimizer_state(trainer):
    return next(iter(trainer.optimizers[0].state.values()))["exp_avg"]


def set_in(target, **values):
    for name, value in values.items():
        setattr(target, name, value)


DEEDS = {
    "weights": (lambda t, m: shift(m.net[0].weight), "['model']['net.0.weight']"),
    "buffers": (lambda t, m: m.net[1](torch.randn(4, 4, 6, 6)), "['model']['net.1.running_mean']"),
    "optimizer": (lambda t, m: shift(optimizer_state(t)), "['optimizer'][0]['state'][0]['exp_avg']"),
    "scheduler": (lambda t, m: t.lr_scheduler_configs[0].scheduler.step(), "['scheduler'][0]['last_epoch']"),
    "metrics": (lambda t, m: m.log("dirty", 3.0), "['journal'][1]['metrics']"),
    "torch": (lambda t, m: torch.rand(1), "['torch']"),
    "numpy": (lambda t, m: np.random.rand(), "['numpy']"),  # noqa: NPY002
    "python": (lambda t, m: random.random(), "['python']"),
    "training": (lambda t, m: m.eval(), "['journal'][1]['flags'][0][0]"),
    "one_flag": (lambda t, m: m.net[6].eval(), "['training'][8]"),
    "grad": (lambda t, m: shift(m.net[0].weight.grad), "['journal'][1]['grads'][0]"),
    "requires_grad": (lambda t, m: m.net[7].requires_grad_(False), "['requires_grad'][6]"),
    "dtype": (lambda t, m: torch.set_default_dtype(torch.float64), "['settings']['dtype']"),
    "autocast": (lambda t, m: torch.set_autocast_enabled("cpu", True), "['settings']['autocast']"),
    "autocast_cache": (lambda t, m: torch.set_autocast_cache_enabled(False), "['settings']['autocast_cache']"),
    "matmul": (lambda t, m: torch.set_float32_matmul_precision("medium"), "['settings']['matmul']"),
    "cudnn": (lambda t, m: set_in(torch.backends.cudnn, enabled=False), "['settings']['cudnn']"),
    "tf32": (lambda t, m: set_in(torch.backends.cudnn, allow_tf32=False), "['settings']['tf32']"),
    "fast_path": (lambda t, m: torch.backends.mha.set_fastpath_enabled(False), "['settings']['fast_path']"),
    "deterministic": (lambda t, m: torch.use_deterministic_algorithms(True), "['settings']['deterministic']"),
}


@pytest.fixture(name="clean", scope="module")
def _clean(tmp_path_factory):
    return run(DIRTY, tmp_path_factory.mktemp("clean"))


DIRTY = Case(lambda: Learner(cnn(), scheduler=lambda o: lr_scheduler.ExponentialLR(o, 0.5)))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("kind", DEEDS)
def test_a_dirty_monitor_is_noticed(tmp_path, clean, kind):
    deed, noticed = DEEDS[kind]
    found = differing(clean, run(DIRTY, tmp_path, Dirty(deed)))
    assert any(name.startswith(noticed) for name in found)


def test_a_dirty_monitor_that_touches_what_a_forward_wrote_is_noticed(tmp_path):
    case = CASES["careless"]
    clean = run(case, tmp_path / "clean")
    dirty = run(case, tmp_path / "dirty", Dirty(lambda t, m: m.net(torch.rand(2, 1, 8, 8))))
    assert {"['plain'][0]", "['hidden'][0]"} <= {"".join(name.partition("[0]")[:2]) for name in differing(clean, dirty)}


@pytest.mark.parametrize("name", ["compiled_net_eager", "compiled_net_aot", "compiled_module"])
def test_compiled_runs_are_compiled(tmp_path, name):
    left = run(CASES[name], tmp_path)
    assert left["['compiled'][0]"] > 0
    assert left["['compiled'][1]"] >= 6  # at least once a step


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", "float32"), ("64-true", "float32"), ("64-true", "float64")]
)
@pytest.mark.parametrize("net", [cnn, lambda: Recurrent(nn.LSTM)], ids=["cnn", "lstm"])
def test_low_and_double_precision_runs_are_measured_with_cast_parameters(tmp_path, precision, dtype, net):
    """The numbers are those of a copy whose parameters were cast, at the samples as the run saw it."""
    models = []
    case = Case(lambda: models.append(Learner(net())) or models[-1], {"precision": precision})
    run(case, tmp_path, small_monitor(heatmap_samples=0, dtype=dtype))
    record = load_records(tmp_path)[-1]
    cast = net().to(getattr(torch, dtype))
    cast.load_state_dict(models[-1].net.state_dict())
    expected = input_spectrum(cast, torch.from_numpy(record.x), [2, 3])
    assert record.eigenvalues.dtype == dtype
    np.testing.assert_allclose(
        record.eigenvalues, expected.eigenvalues.numpy(), atol=1e-6 * expected.spectral_norm.max()
    )


def test_settings_see_an_open_autocast():
    before = settings()
    with torch.autocast("cpu"):
        assert settings()["autocast"] != before["autocast"]
    assert settings() == before


def test_gradients_and_plain_attributes_come_back():
    model, monitor_input = Classifier(), torch.rand(2, 1, 8, 8)
    model(monitor_input).sum().backward()
    grads = [p.grad for p in model.parameters()]
    values = [g.clone() for g in grads]
    before = model.last_input
    input_spectrum(model, torch.rand(1, 1, 8, 8), 0)
    assert model.last_input is before
    assert all(p.grad is g and torch.equal(g, v) for p, g, v in zip(model.parameters(), grads, values, strict=True))
