"""The recorder in loops without a Trainer: the same numbers and files as the callback's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.ranks import TORCHRUN, together
from support.training import Classifier, digits, events, fit, scalar, small_monitor
from torch import nn

from lightning_hessian import (
    ConfigurationError,
    InputHessianRecorder,
    MeasurementError,
    input_gradient,
    input_spectrum,
    load_records,
)

X, Y = digits(64, 96).tensors


def recorder(folder, samples=(X, Y), **arguments):
    """Of two samples and classes 2 and 3, as ``small_monitor``."""
    given = {"classes": [2, 3], "num_samples": 2, "heatmap_samples": 0, "on_error": "raise", "progress_bar": False}
    return InputHessianRecorder(folder, samples, **{**given, **arguments})


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Linear(16, 10))


def step(network: nn.Module) -> None:
    """One step of gradient descent."""
    network.zero_grad()
    nn.functional.cross_entropy(network(X), Y).backward()
    with torch.no_grad():
        for p in network.parameters():
            p -= 0.1 * p.grad


def test_the_same_numbers_and_tags_as_the_callback(tmp_path):
    """Of the same weights, in the same file."""
    trainer = fit(tmp_path / "callback", small_monitor(heatmap_samples=1, samples=(X, Y)))
    last = load_records(tmp_path / "callback")[-1]
    with recorder(tmp_path / "recorder", heatmap_samples=1) as rec:
        record = rec.measure(trainer.lightning_module, last.step, epoch=last.epoch)
    (saved,) = load_records(tmp_path / "recorder")
    for name in ("eigenvalues", "gradient", "trace", "hessian"):
        assert np.array_equal(getattr(saved, name), getattr(last, name)), name
    assert np.array_equal(record.eigenvalues, last.eigenvalues)
    assert (saved.step, saved.logged_step, saved.epoch, saved.stage) == (8, 8, 1, "fit")
    ours, theirs = (events(tmp_path / name).Tags() for name in ("recorder", "callback"))
    for kind in ("scalars", "images", "histograms", "tensors"):
        hessian = {tag for tag in theirs[kind] if "hessian" in tag and "similarity" not in tag}
        # There is no measurement before, and no training whose time is known.
        assert hessian - set(ours[kind]) <= {t for t in hessian if "cosine" in t or "overlap" in t or "overhead" in t}


def test_a_loop_is_not_disturbed(tmp_path):
    """Weights, random numbers and the mode of the network."""
    final = []
    for folder in (None, tmp_path):
        network = small_network().train()
        torch.manual_seed(1)
        rec = None if folder is None else recorder(folder)
        for number in range(4):
            if rec is not None:
                rec.measure(network, number)
                assert network.training
            step(network)
        if rec is not None:
            rec.close()
        final.append([*network.state_dict().values(), torch.rand(2)])
    assert all(torch.equal(a, b) for a, b in zip(*final, strict=True))
    assert [r.step for r in load_records(tmp_path)] == [0, 1, 2, 3]
    assert list(scalar(tmp_path, "hessian_lambda_max/logit_class_2")) == [0, 1, 2, 3]


def test_a_writer_of_the_loop_is_used_and_left_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(tmp_path)
    with recorder(None, writer=writer) as rec:
        rec.measure(small_network(), 5)
    writer.add_scalar("loss", 1.0, 6)
    writer.close()
    assert len(list(tmp_path.glob("events*"))) == 1
    assert scalar(tmp_path, "loss") == {6: 1.0}
    assert list(scalar(tmp_path, "hessian_trace/logit_class_3")) == [5]
    assert len(load_records(tmp_path)) == 1


def test_the_numbers_are_those_of_the_function(tmp_path):
    network = small_network()
    with recorder(tmp_path, classes="label", target="prob", dtype="float64") as rec:
        record = rec.measure(network, 0)
    expected = input_spectrum(network, X[:2], Y[:2], "prob", dtype=torch.float64)
    np.testing.assert_allclose(record.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-12)


def test_a_closed_recorder_says_so(tmp_path):
    """A record that nobody writes would be lost."""
    with recorder(tmp_path) as rec:
        rec.measure(small_network(), 0)
    with pytest.raises(ConfigurationError, match="This recorder is closed"):
        rec.measure(small_network(), 1)
    with recorder(tmp_path, keep_earlier=True) as rec:
        rec.measure(small_network(), 0, stage="validate")
        with pytest.raises(ConfigurationError, match="stage='train' is not known"):
            rec.measure(small_network(), 1, stage="train")


def test_the_first_measurement_of_a_fit_replaces_an_earlier_run_after_others(tmp_path):
    for steps in ((0, 10, 20), (5,)):
        with recorder(tmp_path) as rec:
            rec.measure(small_network(), 5, stage="validate")
            for number in steps:
                rec.measure(small_network(), number)
    assert [(r.step, r.stage) for r in load_records(tmp_path)] == [(0, "fit"), (5, "fit"), (5, "validate")]


def test_arguments_are_checked_at_construction(tmp_path):
    for arguments, error, match in (
        ({"log_dir": None}, ConfigurationError, "Give log_dir"),
        ({"samples": None}, ConfigurationError, "Give samples=x"),
        ({"writer": object()}, ConfigurationError, "give logger.experiment"),
        ({"samples": torch.zeros(2, 3, dtype=torch.long)}, ConfigurationError, "floating point"),
        ({"samples": X}, ConfigurationError, "needs integer labels"),
        ({"target": "logits"}, ConfigurationError, "not known"),
        ({"classes": [1, 2, 1]}, ConfigurationError, r"classes=\[1, 2, 1\] lists 1 more than once"),
        ({"classes": torch.tensor([[1], [2]])}, ConfigurationError, "must be whole numbers, or one of"),
        ({"classes": [True]}, ConfigurationError, "must be whole numbers, or one of"),
        ({"classes": []}, ConfigurationError, "must be whole numbers, or one of"),
        ({"seed": 0.5}, ConfigurationError, "seed=0.5 must be a whole number"),
        ({"val_dataloader_idx": 1}, TypeError, "no argument 'val_dataloader_idx'"),
        ({"every_n_epochs": 1}, TypeError, "no argument 'every_n_epochs'"),
    ):
        with pytest.raises(error, match=match):
            InputHessianRecorder(**{"log_dir": tmp_path, "samples": (X, Y), **arguments})
    with recorder(tmp_path) as rec, pytest.raises(ConfigurationError, match="step=-1"):
        rec.measure(small_network(), -1)
    assert not list(tmp_path.iterdir())


def test_integers_of_numpy_and_tensors_are_whole_numbers(tmp_path):
    one = np.int64(1)
    options = {"num_samples": one, "num_eigenvalues": one, "seed": one, "keep_matrices": one}
    with recorder(tmp_path, heatmap_samples=torch.tensor(1), density_vectors=np.int64(2), **options) as rec:
        rec.measure(small_network(), np.int64(3), epoch=torch.tensor(1), logged_step=np.int32(2))
    (record,) = load_records(tmp_path)
    assert (record.step, record.epoch, record.logged_step, len(record.x)) == (3, 1, 2, 1)
    with recorder(tmp_path) as rec:
        for arguments in ({"step": 3.0}, {"step": True}, {"step": 3, "epoch": -1}, {"step": 3, "logged_step": 2.5}):
            with pytest.raises(ConfigurationError, match="must be a whole number of at least 0"):
                rec.measure(small_network(), **arguments)


def test_the_last_record_is_at_hand_without_its_matrices(tmp_path):
    with recorder(tmp_path, heatmap_samples=1, target="logit") as rec:
        assert rec.last_record is None
        for number in range(2):
            record = rec.measure(small_network(), number)
            assert rec.last_record.step == number
    assert np.array_equal(rec.last_record.eigenvalues, record.eigenvalues)
    assert rec.last_record.overhead == record.overhead
    assert record.matrix(0, 2).shape == (64, 64)
    with pytest.raises(ValueError, match="last_record keeps none; the saved record, which load_records returns, may"):
        rec.last_record.matrix(0, 2)
    with pytest.raises(AttributeError):
        rec.last_record = record


def test_samples_in_arrays_of_numpy(tmp_path):
    with recorder(tmp_path, (X.numpy(), Y.numpy()), classes="label") as rec:
        record = rec.measure(small_network(), 0)
    assert np.array_equal(record.x, X[:2])
    assert np.array_equal(record.labels, Y[:2])


def test_a_tensor_of_classes_holds_for_every_sample(tmp_path):
    """As a list does: curves are named by their class."""
    with recorder(tmp_path, classes=torch.tensor([2, 3])) as rec:
        record = rec.measure(small_network(), 0)
    assert record.class_ids == (2, 3)
    assert record.classes.tolist() == [[2, 3], [2, 3]]


def test_what_does_not_fit_the_model_raises_at_the_first_measurement(tmp_path):
    with (
        recorder(tmp_path, classes=12, on_error="warn") as rec,
        pytest.raises(ConfigurationError, match="out of range"),
    ):
        rec.measure(small_network(), 0)


def test_a_failure_warns_or_raises(tmp_path):
    broken = small_network()
    nn.init.constant_(broken[1].weight, torch.nan)
    with recorder(tmp_path, on_error="warn") as rec:
        rec.measure(small_network(), 0)
        with pytest.warns(UserWarning, match="InputHessianRecorder: no measurement at step 1, and the run continues"):
            assert rec.measure(broken, 1) is None
    with recorder(tmp_path) as rec, pytest.raises(MeasurementError):
        rec.measure(broken, 2)


def test_a_run_that_goes_on_keeps_what_was_before(tmp_path):
    """With the state of a checkpoint, its target and its samples are compared too."""
    network = small_network()
    with recorder(tmp_path) as rec:
        for number in range(3):
            rec.measure(network, number)
            step(network)
        state = rec.state_dict()
    torch.save(state, tmp_path / "state.pt")
    with recorder(tmp_path) as rec:
        rec.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        record = rec.measure(network, 3)
    assert np.isfinite(record.metrics["top_eigenvector_cosine"]).all()
    assert [r.step for r in load_records(tmp_path)] == [0, 1, 2, 3]
    with recorder(tmp_path) as rec:
        rec.measure(network, 0)
    assert [r.step for r in load_records(tmp_path)] == [0]


def test_what_is_measured_last_is_written_at_the_end_of_a_program(tmp_path):
    program = (
        "import sys, torch\nfrom lightning_hessian import InputHessianRecorder\n"
        "recorder = InputHessianRecorder(sys.argv[1], torch.randn(2, 4), classes=0)\n"
        "recorder.measure(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU()), 0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=120)
    assert len(load_records(tmp_path)) == 1
    assert events(tmp_path).Tags()["images"]


RANKS = """
import sys
import torch, torch.distributed as dist
from torch import nn
from lightning_hessian import InputHessianRecorder
from support.ranks import leave
dist.init_process_group("gloo")
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
wrapped = nn.parallel.DistributedDataParallel(network)
samples = torch.randn(5, 6) if dist.get_rank() == 0 else torch.randn(5, 6) + 1
with InputHessianRecorder(sys.argv[1], samples, classes=[0, 2], heatmap_samples=0, on_error="raise") as recorder:
    record = recorder.measure(wrapped, 4)
assert (record is None) == (dist.get_rank() > 0)
dist.destroy_process_group()
leave()  # what would go wrong later, in the interpreter's exit, is not seen
"""


def test_two_processes_share_the_samples(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    together([sys.executable, str(tmp_path / "ranks.py"), str(tmp_path / "run")], TORCHRUN)
    (record,) = load_records(tmp_path / "run")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    expected = input_spectrum(network, torch.randn(5, 6), [0, 2])
    np.testing.assert_allclose(record.eigenvalues, expected.eigenvalues, rtol=1e-4, atol=1e-6)
    assert len(list(Path(tmp_path / "run").glob("events*"))) == 1


def test_fabric_with_bf16(tmp_path):
    """The wrapped module, in float32 without autocast."""
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import TensorBoardLogger

    fabric = Fabric(accelerator="cpu", precision="bf16-mixed", loggers=TensorBoardLogger(tmp_path, name="", version=""))
    network = small_network()
    wrapped = fabric.setup(network)
    with recorder(None, writer=fabric.logger.experiment) as rec:
        record = rec.measure(wrapped, 0)
    expected = input_spectrum(network, X[:2], [2, 3])
    np.testing.assert_allclose(record.lambda_max, expected.lambda_max, rtol=1e-5)
    assert len(load_records(tmp_path)) == 1


FABRIC = """
import sys
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from torch import nn
from lightning_hessian import InputHessianRecorder
from support.ranks import leave
root = sys.argv[1]
logger = TensorBoardLogger(root, name="writer", version="")
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp", precision="bf16-mixed", loggers=logger)
fabric.launch()
torch.manual_seed(0)
network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
network, optimizer = fabric.setup(network, torch.optim.SGD(network.parameters(), lr=0.1))
x, y = torch.randn(2, 5, 6)[fabric.global_rank], torch.tensor([0, 1, 2, 0, 1])
options = {"classes": [0, 2], "dtype": "float64", "on_error": "raise", "progress_bar": False}
first = fabric.global_rank == 0
by_writer = InputHessianRecorder(samples=x, writer=logger.experiment if first else None, **options)
by_log_dir = InputHessianRecorder(root + "/log_dir", x if first else None, **options)
with by_writer, by_log_dir:
    for step in range(2):
        for recorder in (by_writer, by_log_dir):
            assert (recorder.measure(network, step) is not None) == first
        if first:
            torch.save((x, network.module.state_dict()), f"{root}/{step}.pt")
        optimizer.zero_grad()
        fabric.backward(nn.functional.cross_entropy(network(x), y))
        optimizer.step()
        fabric.log("loss", 1.0, step)
logger.finalize("success")
leave()
"""


def test_two_processes_of_fabric(tmp_path):
    """Through its logger and with a directory; the numbers are those of one process, at the first one's samples."""
    (tmp_path / "script.py").write_text(FABRIC)
    together([sys.executable, str(tmp_path / "script.py"), str(tmp_path)], TORCHRUN)
    network = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    for kind in ("writer", "log_dir"):
        records = load_records(tmp_path / kind)
        assert [r.step for r in records] == [0, 1]
        for record in records:
            x, state = torch.load(tmp_path / f"{record.step}.pt", weights_only=True)
            network.load_state_dict(state)
            expected = input_spectrum(network, x.double(), [0, 2])
            np.testing.assert_array_equal(record.x, x.double())
            np.testing.assert_allclose(record.eigenvalues, expected.eigenvalues, rtol=1e-9, atol=1e-12)
            np.testing.assert_allclose(record.gradient, input_gradient(network, x.double(), [0, 2]), rtol=1e-9)
        assert len(list((tmp_path / kind).glob("events*"))) == 1
    assert scalar(tmp_path / "writer", "loss") == {0: 1.0, 1: 1.0}
    assert list(scalar(tmp_path / "writer", "hessian_trace/logit_class_2")) == [0, 1]


def test_flat_shards_are_refused(tmp_path):
    class FullyShardedDataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small_network()

        def forward(self, x):
            return self.inner(x)

    with recorder(tmp_path) as rec, pytest.raises(ConfigurationError, match=r"fully_shard \(FSDP2\)"):
        rec.measure(FullyShardedDataParallel(), 0)


def test_the_lightning_module_of_a_trainer_can_be_measured_without_it(tmp_path):
    module = Classifier()
    with recorder(tmp_path) as rec:
        assert rec.measure(module, 0).valid.all()
    assert module.training
