"""The progress of long measurements is shown beside the Trainer's own bars, which stay as they are."""

import importlib
from functools import partial

import pytest
import torch
from support.networks import measure, mlp
from support.training import Classifier, digits, fit, small_monitor
from torch import nn
from torch.utils.data import DataLoader

from lightning_hessian import load_records
from lightning_hessian.curvature.methods import columns
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.training import progress, trainer_run
from lightning_hessian.training.progress import DELAY, MeasurementBar

F64 = torch.float64


def reported_by(method: str, num_matrices: int = 0, activation: type[nn.Module] = nn.GELU, **options):
    """The progress reported for three samples of two classes with six inputs, and the measurement."""
    x, classes = torch.randn(3, 6, dtype=F64), torch.tensor([[0, 1]] * 3)
    batch = TargetBatch(mlp(activation), lambda z, c: z.softmax(1).gather(1, c), x, classes)
    calls: list[tuple[str, int, int | None]] = []
    result = measure(
        batch, "prob", Options(method, **options), num_matrices=num_matrices, progress=lambda *c: calls.append(c)
    )
    return calls, result


def test_dense_reports_columns():
    calls, _ = reported_by("dense", chunk_size=4)
    assert calls == [("columns", 9, 18), ("columns", 18, 18)]  # in blocks of the same size


def test_columns_are_counted_over_all_groups(monkeypatch):
    """Where memory runs out in the second block, its samples start over, one at a time."""
    columns_of = columns._columns

    def small(batch, mode, block, progress, split):
        if batch.num_samples > 1:
            progress("columns", 4 * batch.num_samples, 6 * batch.num_samples)
            raise torch.OutOfMemoryError("a small device")
        return columns_of(batch, mode, block, progress, split)

    monkeypatch.setattr(columns, "_columns", small)
    calls, _ = reported_by("dense", chunk_size=3)
    assert [done for _, done, _ in calls] == [12, 3, 6, 9, 12, 15, 18]
    assert {(what, total) for what, _, total in calls} == {("columns", 18)}


def test_low_rank_reports_samples():
    calls, _ = reported_by("low_rank", activation=nn.ReLU)
    assert calls == [("samples", 3, 3)]


def test_lanczos_reports_products_and_then_the_columns_of_whole_matrices():
    calls, result = reported_by("lanczos", num_matrices=1, num_eigenvalues=2)
    products = [call for call in calls if call[0] == "products"]
    assert products == [("products", i + 1, None) for i in range(len(products))]
    assert len(products) >= result.spectrum.cost.num_matvecs - 2
    assert calls[len(products) :]
    assert calls[-1] == ("columns", 6, 6)


class Line:
    """Records what is drawn."""

    def __init__(self, drawn, text, total):
        self.drawn = drawn
        drawn.append((text, total))

    def update(self, done):
        self.drawn.append(done)

    def close(self):
        self.drawn.append("closed")


def test_nothing_is_drawn_in_the_first_second():
    drawn, clock = [], iter([0.0, 0.5 * DELAY, 0.9 * DELAY, 1.1 * DELAY, 1.2 * DELAY, 1.3 * DELAY])
    with MeasurementBar(lambda text, total: Line(drawn, text, total), lambda: next(clock)) as bar:
        for done in (1, 2, 3, 4):
            bar("products", done, None)
            assert bool(drawn) == (done > 2)
        bar("columns", 7, 9)
    assert drawn == [
        ("Input Hessian, products", None),
        3,
        4,
        "closed",
        ("Input Hessian, columns", 9),
        7,
        "closed",
    ]


def test_a_display_that_fails_costs_no_measurement():
    def broken(*_):
        raise BrokenPipeError("the terminal is gone")

    with MeasurementBar(broken, lambda: 0.0) as bar:
        bar._begin = -2 * DELAY
        bar("columns", 1, 2)
        assert bar._new_line is progress.no_line


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(progress, "DELAY", 0.0)


def bars(house: str):
    return importlib.import_module(f"{house}.callbacks")


HOUSES = ("lightning.pytorch", "pytorch_lightning")


def trained(house, folder, bar, measuring):
    """A short run of one of the two Lightnings, in which ``measuring`` is called at the end of each epoch."""
    lightning = importlib.import_module(house)

    class Measuring(lightning.Callback):
        def on_train_epoch_end(self, trainer, module):
            measuring(trainer)

    class Model(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            pass

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        callbacks=[Measuring(), bar],
        default_root_dir=folder,
    )
    trainer.fit(Model(), DataLoader(digits(), batch_size=16), DataLoader(digits(64, 96), batch_size=16))
    return trainer


@pytest.mark.parametrize("house", HOUSES)
@pytest.mark.usefixtures("at_once")
def test_beside_tqdm(house, tmp_path, capsys):
    seen = []

    def measuring(trainer):
        own = trainer.progress_bar_callback.train_progress_bar
        before = (own.n, own.total, own.pos)
        with MeasurementBar(partial(progress.line_beside, trainer.progress_bar_callback)) as bar:
            for done in (1, 2):
                bar("columns", done, 2)
            line = bar._line._bar
            assert type(line) is type(own)
            assert abs(line.pos) == abs(own.pos) + 1  # the next line
        assert line.disable  # closed
        assert not line.leave
        assert (own.n, own.total, own.pos) == before
        assert line not in type(own)._instances
        seen.append(trainer.current_epoch)

    trainer = trained(house, tmp_path, bars(house).TQDMProgressBar(), measuring)
    assert seen == [0, 1]
    printed = capsys.readouterr().out
    assert "Input Hessian, columns:   0%" in printed
    assert "0/2" in printed
    assert "Epoch 1: 100%" in printed.rsplit("Input Hessian", 1)[1]
    assert trainer.progress_bar_callback.train_progress_bar.n == 4


@pytest.mark.parametrize("house", HOUSES)
@pytest.mark.usefixtures("at_once")
def test_beside_rich(house, tmp_path, capsys):
    seen = []

    def measuring(trainer):
        theirs = trainer.progress_bar_callback
        before = {task.id: (task.description, task.completed, task.visible) for task in theirs.progress.tasks}
        with MeasurementBar(partial(progress.line_beside, theirs)) as bar:
            bar("products", 3, None)
            bar("columns", 5, 9)
            theirs.progress.refresh()
            endless, counted = (task for task in theirs.progress.tasks if task.fields.get(progress.OWN))
            assert (endless.completed, endless.visible) == (3, False)
            assert (counted.completed, counted.total, counted.visible) == (5, 9, True)
            seen.append(theirs.progress.console.export_text() if theirs.progress.console.record else None)
        assert not counted.visible
        theirs.progress.refresh()
        after = {task.id: (task.description, task.completed, task.visible) for task in theirs.progress.tasks}
        assert {key: after[key] for key in before if key in after} | {
            counted.id: after[counted.id],
            endless.id: after[endless.id],
        } == after
        assert all(after[key] == value for key, value in before.items() if key not in (counted.id, endless.id))
        assert theirs.train_progress_bar.description.startswith("Epoch")  # found by place
        assert theirs.val_progress_bar.description == "Validation"

    trainer = trained(house, tmp_path, bars(house).RichProgressBar(), measuring)
    assert len(seen) == 2
    printed = capsys.readouterr().out
    assert "Epoch 1/1" in printed
    assert len([t for t in trainer.progress_bar_callback.progress.tasks if t.fields.get(progress.OWN)]) == 2


@pytest.mark.parametrize("make", [lambda house: None, lambda house: bars(house).TQDMProgressBar(refresh_rate=0)])
@pytest.mark.parametrize("house", HOUSES)
@pytest.mark.usefixtures("at_once")
def test_no_display_nothing_drawn(house, make, capsys):
    with MeasurementBar(partial(progress.line_beside, make(house))) as bar:
        bar("columns", 1, 2)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["TQDMProgressBar", "RichProgressBar"])
@pytest.mark.usefixtures("at_once")
def test_the_monitor_shows_its_measurements(name, tmp_path, monkeypatch):
    drawn = []
    line_beside = progress.line_beside

    def watched(bar, text, total):
        drawn.append((type(bar).__name__, text, total))
        return line_beside(bar, text, total)

    monkeypatch.setattr(trainer_run, "line_beside", watched)
    bar = getattr(bars("lightning.pytorch"), name)()
    fit(tmp_path, small_monitor(), bar, model=Classifier(), enable_progress_bar=True)
    assert drawn == [(name, "Input Hessian, columns", 2 * 64)] * 3
    assert len(load_records(tmp_path)) == 3
