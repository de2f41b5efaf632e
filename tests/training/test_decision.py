"""What is decided and said about a measurement that is about to be made."""

import logging
import shlex

import pytest
import torch
from support.measuring import Measurer
from support.networks import mlp
from support.training import Classifier, fit, small_monitor
from torch import nn

from lightning_hessian import InputHessianRecorder, load_records
from lightning_hessian.curvature import analysis
from lightning_hessian.curvature.analysis import differentiate
from lightning_hessian.curvature.checks.diagnosis import Diagnosis
from lightning_hessian.curvature.methods.plan import Plan
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.training.decision import what_makes_it_shorter
from lightning_hessian.training.samples import Samples

CURVED = Diagnosis("curved", "curved")


def test_what_makes_a_measurement_shorter():
    classes = torch.zeros(2, 1, dtype=torch.long)
    batch = TargetBatch(mlp(), lambda z, c: z.gather(1, c), torch.randn(2, 6), classes)
    heatmaps, dense = (Plan(method, "", CURVED, num_matrices=2) for method in ("lanczos", "dense"))
    assert what_makes_it_shorter(heatmaps, batch, Options()) == "heatmap_samples=0, fewer num_samples or max_seconds"
    assert what_makes_it_shorter(dense, batch.select(slice(0, 1)), Options(max_seconds=1.0)) == "method='lanczos'"


def test_a_piecewise_linear_network_is_examined_again_at_the_samples_whose_turn_it_is(monkeypatch):
    examined = []

    def recorded(batch, costs, memory, generator=None):
        examined.append((batch.num_samples, generator is not None))
        return differentiate(batch, costs, memory, generator)

    monkeypatch.setattr(analysis, "differentiate", recorded)
    measurer = Measurer(1, "prob", "float64", Options(), heatmap_samples=0)
    samples = Samples(torch.randn(5, 6), None)
    for step in range(2):
        measurer.measure(mlp(nn.ReLU), samples, step=step)
    assert examined == [(5, True), (5, False), (1, True)]


def shown(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == logging.INFO and "InputHessian" in r.getMessage()]


def test_one_line_says_what_a_monitor_will_do_and_where_to_look(tmp_path, caplog):
    folder = tmp_path / "my logs"
    with caplog.at_level("INFO"):
        fit(folder, small_monitor(num_samples=3), max_epochs=2)
    (line,) = [message for message in shown(caplog) if "of the training time" not in message]
    assert line.startswith(
        "InputHessianMonitor: 3 samples, D = 64, classes 2, 3 of logit, method dense (D = 64 is small"
    )
    assert "\n" not in line
    assert " s per measurement" in line
    assert line.endswith(f"To see the results: tensorboard --logdir {shlex.quote(str(folder))}")


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("label", "class 'label' of prob"),
        ("all", "all 10 classes of prob"),
        (4, "class 4 of prob"),
        (list(range(10)), "classes 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 of prob"),
    ],
)
def test_classes_in_a_line(tmp_path, caplog, classes, words):
    x, labels = torch.rand(2, 1, 8, 8), torch.tensor([1, 2])
    with (
        caplog.at_level("INFO"),
        InputHessianRecorder(tmp_path, (x, labels), classes, "prob", heatmap_samples=0) as recorder,
    ):
        for step in (0, 1):
            recorder.measure(Classifier(nn.ReLU), step=step)
    (line,) = [message for message in shown(caplog) if "of the training time" not in message]
    assert line.startswith(f"InputHessianRecorder: 2 samples, D = 64, {words}, method ")


def test_without_a_tensorboard_logger_the_records_are_named(tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="No TensorBoard logger"):
        fit(tmp_path, small_monitor(), logger=False, max_epochs=1)
    assert f"To see the results: load_records({str(tmp_path)!r})" in shown(caplog)[0]


def test_the_records_of_a_named_monitor_are_named(tmp_path, caplog):
    with caplog.at_level("INFO"), pytest.warns(UserWarning, match="No TensorBoard logger"):
        fit(tmp_path, small_monitor(name="aux"), logger=False, max_epochs=1)
    assert f"To see the results: load_records({str(tmp_path)!r}, name='aux')" in shown(caplog)[0]
    assert load_records(str(tmp_path), name="aux")
