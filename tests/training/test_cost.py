"""The cost of measurements is logged, and no memory stays in use after one."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from support.counting import Notes
from support.measuring import Measurer
from support.networks import mlp
from support.training import Classifier, events, fit, scalar, small_monitor
from torch import nn

from lightning_hessian import MeasurementError, input_spectrum, load_records
from lightning_hessian.curvature import memory
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.options import Options
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.text import diagnosis_text


def test_every_measurement_logs_its_cost(tmp_path):
    trainer = fit(tmp_path, small_monitor())
    records = load_records(tmp_path)
    for tag, field in {"seconds": "seconds", "matvecs": "num_matvecs", "overhead": "overhead"}.items():
        known = {r.logged_step: getattr(r, field) for r in records if getattr(r, field) is not None}
        assert scalar(tmp_path, f"hessian_cost/{tag}") == pytest.approx(known)
        assert f"hessian_cost/{tag}" in trainer.callback_metrics
    assert [r.overhead is None for r in records] == [True, False, False]
    assert all(r.seconds > 0 and r.num_matvecs == 64 and (r.memory is None or r.memory >= 0) for r in records)
    assert "hessian_cost/skipped" not in events(tmp_path).Tags()["scalars"]


def of_memory(memory, exact):
    monitor = Measurer([0], "logit", "float64", Options(), heatmap_samples=0)
    record = monitor.measure(mlp(), Samples(torch.randn(2, 6), None), step=0, logged_step=0, epoch=0)
    record = dataclasses.replace(record, memory=memory, memory_exact=exact)
    return scalars(record).get("hessian_cost/peak_memory_mib"), diagnosis_text(record)


def test_a_bound_is_never_logged_as_a_peak():
    logged, text = of_memory(3 * 2**20, True)
    assert logged == 3.0
    assert "class, 3 MiB of memory" in text
    logged, text = of_memory(3 * 2**20, False)
    assert logged is None
    assert "at most 3 MiB of memory" in text
    assert "at most 1 MiB of memory" in of_memory(2**10, True)[1]
    logged, text = of_memory(None, False)
    assert logged is None
    assert "of memory" not in text


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((100, 150), (100, 400), (300, True)),  # the measurement raised the peak: it is its own
        ((100, 900), (120, 900), (800, False)),  # training had used more
        ((100, 100), (90, 90), (0, False)),  # by a kernel's counters, which are not exact
    ],
)
def test_the_peak_on_a_gpu(monkeypatch, before, after, expected):
    """By readings put in for the device's; nothing else of torch.cuda may be touched."""
    fixed, peak = ([reading[i] for reading in (before, after)] for i in (0, 1))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: fixed.pop(0))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: peak.pop(0))
    monkeypatch.delattr(torch.cuda, "reset_peak_memory_stats")
    cost = Meter(torch.device("cuda", 0)).cost(7)
    assert (cost.memory, cost.memory_exact) == expected
    assert cost.num_matvecs == 7


def test_no_number_where_the_system_reports_none(monkeypatch, tmp_path):
    assert memory.current_and_peak_memory(torch.device("meta")) is None
    (tmp_path / "status").write_text("Name:\tpython\nVmRSS:\t10 kB\n")
    for status in (tmp_path / "status", tmp_path / "missing"):
        monkeypatch.setattr(memory, "STATUS", status)
        assert input_spectrum(mlp(), torch.zeros(1, 6), 0).cost.memory is None


# In a fresh process: a tensor of 64 MiB is allocated and freed, then one of 8 MiB.
SCRIPT = """
import torch
from lightning_hessian.curvature.meter import Meter
for size in (64, 8):
    meter = Meter(torch.device("cpu"))
    torch.ones(size * 2**18)
    cost = meter.cost(0)
    print(cost.memory / 2**20, int(cost.memory_exact))
"""


def test_the_peak_on_the_cpu():
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc gives freed tensors back at once
    command = [sys.executable, "-c", SCRIPT]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    (first, exact), (second, not_exact) = (map(float, line.split()) for line in printed.splitlines())
    assert exact == 1
    assert first == pytest.approx(64, abs=8)
    assert not_exact == 0
    assert second >= 8


def tensors_in(value, depth: int = 8):
    """All tensors reachable through attributes and containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, (type, str, bytes, np.ndarray)):
        inner = list(value.items()) if isinstance(value, dict) else value
        inner = inner if isinstance(inner, (list, tuple, set, frozenset)) else ()
        slots = [getattr(value, name, None) for name in getattr(type(value), "__slots__", ())]
        for part in (*inner, *slots, *getattr(value, "__dict__", {}).values()):
            yield from tensors_in(part, depth - 1)


BYTES_OF_CHECKS = 6  # for each sample a step in float32 and two flags


@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_monitor_holds_no_tensors_but_its_samples(tmp_path, method):
    monitor = small_monitor(method=method)
    fit(tmp_path, monitor)
    found = list(tensors_in(monitor))
    samples = monitor._current_run._state.samples
    assert any(t is samples.inputs for t in found)  # the walk finds what there is
    assert all(t.device.type == "cpu" and not t.requires_grad for t in found)
    assert sum(t.nbytes for t in found) == samples.inputs.nbytes + samples.labels.nbytes + BYTES_OF_CHECKS * len(
        samples
    )


class Wide(nn.Module):
    """Notes every large intermediate result."""

    seen = Notes()

    def __init__(self, activation: type[nn.Module]) -> None:
        super().__init__()
        self.net = mlp(activation, width=300)

    def forward(self, x):
        hidden = self.net[:2](x)
        type(self).seen.append(weakref.ref(hidden))
        return self.net[2:](hidden)


def tensor_bytes() -> int:
    return sum(t.nbytes for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter))


@pytest.mark.parametrize(
    ("method", "activation"), [("dense", nn.GELU), ("lanczos", nn.GELU), ("low_rank", nn.ReLU), ("lanczos", nn.ReLU)]
)
@pytest.mark.parametrize("fails", [False, True])
def test_graphs_are_freed_at_once(method, activation, fails):
    """Without waiting for the garbage collector: nothing lies in a cycle of references."""
    Wide.seen = Notes()
    net, monitor = Wide(activation), Measurer([0], "prob", "float64", Options(method), heatmap_samples=1)
    samples, when = Samples(torch.randn(2, 6), None), {"step": 0, "logged_step": 0, "epoch": 0}
    monitor.measure(net, samples, **when)
    if fails:
        nn.init.constant_(net.net[4].bias, float("nan"))
    gc.collect()
    gc.disable()
    try:
        before = tensor_bytes()
        if fails:
            with pytest.raises(MeasurementError, match="not finite"):
                monitor.measure(net, samples, **when)
        else:
            monitor.measure(net, samples, **when)
        assert tensor_bytes() == before
        assert Wide.seen
        assert all(hidden() is None for hidden in Wide.seen)
    finally:
        gc.enable()


class Failing(Classifier):
    """Cannot be measured any more once it has been trained; notes what it had computed when it failed."""

    seen = Notes()

    def forward(self, x):
        hidden = self.net[0](x)
        if len(x) == 2 and self.trainer.global_step:  # the samples
            type(self).seen.append(weakref.ref(hidden))
            raise RuntimeError("this forward fails")
        return self.net[1:](hidden)


class Freed(Callback):
    """Looks, right after the monitor, whether anything of the measurement is still there."""

    def on_train_epoch_start(self, *_):
        gc.collect()
        gc.disable()

    def on_train_epoch_end(self, *_):
        self.left = [hidden() for hidden in Failing.seen if hidden() is not None]
        self.num_seen = len(Failing.seen)
        gc.enable()


def test_a_failed_measurement_of_a_run_holds_nothing(tmp_path):
    Failing.seen = Notes()
    monitor, freed = small_monitor(on_error="warn", target="logit"), Freed()
    with pytest.warns(UserWarning, match="no measurement at step 4.*this forward fails"):
        fit(tmp_path, monitor, freed, model=Failing(), max_epochs=1)
    assert freed.num_seen
    assert not freed.left
