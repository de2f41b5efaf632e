"""Measuring stays within a share of the training time, and says where it does not, or takes long."""

import dataclasses
from functools import partial

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from support.training import events, fit, scalar, small_monitor

from lightning_hessian import load_records
from lightning_hessian.curvature import meter
from lightning_hessian.training import run
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.schedule import Budget


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


@pytest.mark.parametrize(
    ("seconds", "later"),
    [
        (
            (8000.0, 8000.0, 20000.0, 30000.0),
            ["a measurement now takes about 5.56 h."],
        ),  # 8000 and 30000: less than twice
        ((20000.0, 500.0, 500.0, 500.0), []),  # the first one also did what a run does once
    ],
)
def test_a_long_measurement_is_announced_once_until_it_gets_much_longer(tmp_path, monkeypatch, caplog, seconds, later):
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
        state.previous = dataclasses.replace(state.previous, seconds=seconds[min(len(measured), 4) - 1])
        return record

    measure = run.measure
    monkeypatch.setattr(run, "measure", timed)
    monkeypatch.setattr(meter, "clock", Ticking())
    with caplog.at_level("INFO"):
        fit(tmp_path, small_monitor(), max_epochs=4)
    first, *others = told(caplog, "To shorten it")
    assert "about 67 min per measurement. To shorten it: fewer num_samples, " in first  # 0.7 · 3/4 · 64 · 2 minutes
    assert "method='lanczos' or max_seconds. To see the results: " in first
    assert len(others) == len(later)
    assert all(sentence in message for sentence, message in zip(later, others, strict=True))


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
