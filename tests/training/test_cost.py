"""The cost of measurements is logged and stays within its budget, and no memory stays in use after one."""

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.counting import Notes
from support.measuring import Measurer
from support.networks import mlp
from support.training import Classifier, events, fit, scalar, small_monitor
from torch import nn

from lightning_hessian import MeasurementError, input_spectrum, load_records
from lightning_hessian.curvature import memory, meter
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.options import Options
from lightning_hessian.training import run
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.samples import Samples
from lightning_hessian.training.schedule import Budget
from lightning_hessian.writers.scalars import scalars
from lightning_hessian.writers.text import diagnosis_text


class Clock:
    """Advances only where ``now`` is changed."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def spend(budget: Budget, seconds: float) -> None:
    with budget.measuring():
        budget._clock.now += seconds


def test_a_measurement_is_made_when_the_training_has_paid_for_it():
    clock = Clock()
    budget = Budget(0.05, clock)
    assert budget.allows()  # its cost is not known
    spend(budget, 4)
    assert budget.overhead is None
    budget.start()
    clock.now += 159  # (4 + 4) / 0.05 = 160
    assert not budget.allows()
    assert budget.overhead == pytest.approx(4 / 159)
    clock.now += 1
    assert budget.allows()
    spend(budget, 2)  # from now on two seconds are expected: (6 + 2) / 0.05 = 160
    assert budget.allows()
    spend(budget, 3)
    assert not budget.allows()
    assert budget.overhead == pytest.approx(9 / 160)


def test_the_overhead_counts_the_measurement_that_is_being_made():
    clock = Clock()
    budget = Budget(clock=clock)
    budget.start()
    spend(budget, 1)
    clock.now += 100
    with budget.measuring():
        clock.now += 4
        assert budget.overhead == pytest.approx(5 / 100)
    assert budget.overhead == pytest.approx(5 / 100)


def test_a_failed_measurement_has_cost_its_time():
    clock = Clock()
    budget = Budget(0.1, clock)
    budget.start()

    def fail():
        with budget.measuring():
            clock.now += 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    clock.now += 99
    assert not budget.allows()
    clock.now += 1
    assert budget.allows()


def test_without_a_limit_all_is_allowed_and_nothing_counted():
    budget = Budget(None, Clock())
    budget.start()
    spend(budget, 1e9)
    assert budget.allows()
    assert budget.skipped is None


def test_it_is_seen_where_measuring_takes_much_of_the_time():
    clock = Clock()
    budget, limited = (Budget(share, clock) for share in (None, 0.9))
    for each in (budget, limited):
        spend(each, 13)
    for each in (budget, limited):
        each.start()
    clock.now += 40
    assert budget.overhead > 0.25
    assert not budget.takes_much  # after one
    for each in (budget, limited):
        spend(each, 12)
    clock.now += 60 - 12  # for the first, the time of the other is training
    assert budget.overhead == pytest.approx(0.25)
    assert not budget.takes_much
    spend(budget, 1)
    assert budget.takes_much
    assert not limited.takes_much  # as its user allowed
    clock.now += 100
    assert not budget.takes_much
    short = Budget(None, clock)
    short.start()
    spend(short, 0.4)
    clock.now += 1
    spend(short, 0.4)
    assert not short.takes_much  # nobody would notice


@pytest.mark.parametrize("value", [0, -0.1, 1.5, float("nan"), True, "5%"])
def test_what_is_no_share_raises_at_construction(value):
    with pytest.raises(MisconfigurationException, match=r"max_overhead=.* above 0 and up to 1.*0\.05 for a twentieth"):
        small_monitor(max_overhead=value)


class Pace(Callback):
    """Every batch takes 10 seconds and every measurement 4, by a clock of its own."""

    def __init__(self, monkeypatch, seconds: float = 4) -> None:
        self.clock, measure = Clock(), run.measure

        def timed(*arguments, **options):
            self.clock.now += seconds
            return measure(*arguments, **options)

        monkeypatch.setattr(run, "measure", timed)
        monkeypatch.setattr(run, "Budget", partial(Budget, clock=self.clock))

    def on_train_batch_end(self, *_):
        self.clock.now += 10


def test_skipped_measurements_are_seen(tmp_path, monkeypatch):
    monitor = small_monitor(max_overhead=0.1)  # 8 seconds are within it after 80: at the second epoch's end
    with pytest.warns(
        UserWarning, match="no measurement at step 4: it would take more than max_overhead=0.1"
    ) as caught:
        fit(tmp_path, Pace(monkeypatch), monitor, max_epochs=3)
    assert sum("max_overhead" in str(w.message) for w in caught) == 1
    records = load_records(tmp_path)
    assert [(r.step, r.skipped) for r in records] == [(0, 0), (8, 1), (12, 1)]
    assert scalar(tmp_path, "hessian_cost/skipped") == {0: 0, 3: 1, 7: 1, 11: 1}
    assert scalar(tmp_path, "hessian_cost/overhead") == pytest.approx({7: 8 / 80, 11: 12 / 120})
    texts = [e.tensor_proto.string_val[0].decode() for e in events(tmp_path).Tensors("hessian_diagnosis/text_summary")]
    assert len(texts) == 4
    assert "Skipped here.** 1 measurement has been skipped so far" in texts[1]
    assert "measuring has taken 10 % of the training time. 1 measurement has been skipped so far" in texts[2]


def told(caplog, words: str) -> list[str]:
    return [r.getMessage() for r in caplog.records if words in r.getMessage()]


@pytest.mark.parametrize(("seconds", "num_told"), [(4, 0), (7, 1)])
def test_measuring_that_takes_much_of_the_time_is_told_once(tmp_path, monkeypatch, caplog, seconds, num_told):
    """Each two measurements for the first 40 seconds of training."""
    with caplog.at_level("INFO"):
        fit(tmp_path, Pace(monkeypatch, seconds), small_monitor(), max_epochs=3)
    messages = told(caplog, "measuring has taken")
    assert len(messages) == num_told
    for message in messages:
        assert message.startswith("InputHessianMonitor: so far, measuring has taken 35 % of the training time.")
        assert all(name in message for name in ("max_overhead", "num_samples", "heatmap_samples"))


def test_a_long_measurement_is_announced_once_until_it_gets_much_longer(tmp_path, monkeypatch, caplog):
    measured = []

    class Ticking(Clock):
        """Every HVP of the analysis takes a minute, and the record says what the test wants."""

        def __call__(self):
            self.now += 60 if not measured else 0
            return self.now

    def timed(*arguments, **options):
        record = measure(*arguments, **options)
        measured.append(record)
        state = arguments[3]
        state.previous = dataclasses.replace(state.previous, seconds=(8000.0, 20000.0, 30000.0, 0.0)[len(measured) - 1])
        return record

    measure = run.measure
    monkeypatch.setattr(run, "measure", timed)
    monkeypatch.setattr(meter, "clock", Ticking())
    with caplog.at_level("INFO"):
        fit(tmp_path, small_monitor(), max_epochs=3)
    first, second = told(caplog, "To shorten it")
    assert "about 67 min a measurement. To shorten it: fewer num_samples, " in first  # 0.7 · 3/4 · 64 · 2 minutes
    assert "method='lanczos' or max_seconds. Look: " in first
    assert "a measurement now takes about 5.56 h." in second  # not for 8000 s: less than twice as long


def test_a_limit_holds_for_every_measurement(tmp_path, monkeypatch):
    """No time at all: the least is measured, and the pictures are left out."""
    fit(tmp_path, small_monitor(method="lanczos", max_seconds=1e-9), max_epochs=1)
    records = load_records(tmp_path)
    assert len(records) == 2
    for record in records:
        assert record.hessian is None
        assert "To stay within max_seconds=1e-09, no heatmaps were drawn, trace and norms" in record.message
    with pytest.raises(MisconfigurationException, match="max_seconds=0 must be a positive number"):
        small_monitor(max_seconds=0)


def test_another_run_has_its_own_budget(tmp_path, monkeypatch):
    pace, monitor = Pace(monkeypatch), small_monitor(max_overhead=0.1)
    for folder in (tmp_path / "one", tmp_path / "two"):
        with pytest.warns(UserWarning, match="max_overhead"):
            fit(folder, pace, monitor, max_epochs=3)
        first, *others = load_records(folder)
        assert (first.step, first.skipped, first.overhead) == (0, 0, None)
        assert [(r.step, r.skipped) for r in others] == [(8, 1), (12, 1)]


@pytest.mark.parametrize("first_process_allows", [True, False])
def test_the_first_process_decides(tmp_path, monkeypatch, first_process_allows):
    """What another process gets from it counts, not its own clock."""
    monitor = small_monitor(max_overhead=0.5)

    def own(budget):
        return not first_process_allows

    def on_first(self, work):
        return first_process_allows if getattr(work, "__func__", None) is own else work()

    monkeypatch.setattr(Budget, "allows", own)
    monkeypatch.setattr(ProcessGroup, "on_first", on_first)
    if first_process_allows:
        fit(tmp_path, monitor, max_epochs=1)
        assert len(load_records(tmp_path)) == 2
    else:
        with pytest.warns(UserWarning, match="max_overhead=0.5"):
            fit(tmp_path, monitor, max_epochs=1)
        assert not list(tmp_path.rglob("*.safetensors"))


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
    in_evaluation = True

    def forward(self, x):
        hidden = self.net[0](x)
        is_sample = len(x) == 2
        if is_sample and self.trainer.global_step and (self.in_evaluation or x.requires_grad):
            Failing.seen.append(weakref.ref(hidden))
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


class FailingInDerivatives(Failing):
    in_evaluation = False


@pytest.mark.parametrize("kind", [Failing, FailingInDerivatives])
def test_a_failed_measurement_of_a_run_holds_nothing(tmp_path, kind):
    Failing.seen = Notes()
    monitor, freed = small_monitor(on_error="warn", target="logit"), Freed()
    with pytest.warns(UserWarning, match="no measurement at step 4.*this forward fails"):
        fit(tmp_path, monitor, freed, model=kind(), max_epochs=1)
    assert freed.num_seen
    assert not freed.left
