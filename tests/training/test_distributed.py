"""Several processes measure together: gloo on the CPU, each process a real one, a hang is a failure."""

import re
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.ranks import BROKEN, SEQUENCES, TORCHRUN, Sharded, launch, measured_alone, sequence
from support.training import Classifier, digits, events, small_monitor, whole_hessians
from torch import nn

from lightning_hessian import load_records
from lightning_hessian.errors import ConfigurationError
from lightning_hessian.training.distributed import ProcessGroup
from lightning_hessian.training.measurement import measure
from lightning_hessian.training.trainer_access import process_group

NUMBERS = (
    "eigenvalues",
    "gradient",
    "trace",
    "frobenius_norm",
    "gauss_newton_norm",
    "functional_norm",
    "diagonal",
    "hessian",
)
sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason="fully_shard of torch 2.6 fails on a CPU, with a monitor or without",
)
NODES = [{"NODE_RANK": str(rank), "LOCAL_RANK": "0"} for rank in (0, 1)]
TOGETHER = ("uneven", "without", "relu", "one", "lanczos", "float64")
FAILING = (
    "faulty",
    "raising",
    "all_raising",
    "unwritable",
    "no_samples_on_1",
    "no_samples_on_0",
    "bad_input",
    "bad_classes",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All scenarios that two processes of one launch can run one after another."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder, *TOGETHER, *FAILING, *SEQUENCES, "sharded", "sharded_without", "late", environments=TORCHRUN)
    return folder


def left(folder, scenario):
    """What the two ranks left."""
    return [torch.load(folder / scenario / f"rank_{rank}.pt") for rank in (0, 1)]


def alone(model: nn.Module, weights, num_samples: int, **arguments):
    """The record of the same weights by a single process."""
    model.load_state_dict(weights)
    x, y = digits(64, 64 + 2 * num_samples).tensors  # rank 0 sees every second sample
    return measured_alone(model, x[::2], y[::2], small_monitor(**arguments))


def assert_same(record, expected, tolerance=2e-5):
    assert (record.target, record.method, record.network) == (expected.target, expected.method, expected.network)
    assert (record.diagnosis, record.network) == (expected.diagnosis, expected.network)  # samples take turns in checks
    for name in ("x", "classes", "predicted"):
        np.testing.assert_array_equal(getattr(record, name), getattr(expected, name))
    for name in NUMBERS:
        ours, theirs = getattr(record, name), getattr(expected, name)
        if name == "hessian":
            ours = whole_hessians(record, len(theirs))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(), err_msg=name)


@pytest.mark.parametrize(
    ("scenario", "activation", "arguments"),
    [
        ("uneven", nn.GELU, {"heatmap_samples": 2}),
        ("relu", nn.ReLU, {}),
        ("float64", nn.GELU, {"heatmap_samples": 2, "dtype": "float64", "classes": "predicted"}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*the network is piecewise linear")
def test_three_samples_on_two_ranks_are_those_of_one_process(folder, scenario, activation, arguments):
    first, second = left(folder, scenario)
    assert first["error"] is second["error"] is None
    record = load_records(folder / scenario / "home_0")[-1]
    expected = alone(Classifier(activation), first["weights"], 3, **arguments)
    assert len(record.x) == 3
    assert_same(record, expected)


def test_the_buffers_of_another_rank_give_other_numbers(folder):
    """So the test above can fail: each rank's batch norms have seen batches of their own."""
    record = load_records(folder / "uneven" / "home_0")[-1]
    other = alone(Classifier(), left(folder, "uneven")[1]["weights"], 3, heatmap_samples=2)
    with pytest.raises(AssertionError):
        assert_same(record, other)


@pytest.mark.parametrize(
    ("with_monitor", "without"),
    [("uneven", "without"), pytest.param("sharded", "sharded_without", marks=sharding)],
)
def test_training_is_not_disturbed(folder, with_monitor, without):
    for measured, plain in zip(left(folder, with_monitor), left(folder, without), strict=True):
        assert measured["weights"].keys() == plain["weights"].keys()
        for name, tensor in plain["weights"].items():
            assert torch.equal(measured["weights"][name], tensor), name


@pytest.mark.parametrize(
    "scenario",
    [TOGETHER[0], *TOGETHER[2:], pytest.param("sharded", marks=sharding), "no_samples_on_1"],
)
def test_all_ranks_get_the_scalars_and_only_the_first_writes(folder, scenario):
    first, second = left(folder, scenario)
    ours = {k: v for k, v in first["metrics"].items() if k.startswith("hessian")}
    assert len(ours) > 10
    assert {k: v for k, v in second["metrics"].items() if k.startswith("hessian")} == pytest.approx(ours, nan_ok=True)
    assert not list((folder / scenario / "home_1").rglob("*.*"))
    assert any(tag.startswith("hessian/") for tag in events(folder / scenario / "home_0").Tags()["images"])


@pytest.mark.parametrize(("scenario", "num_samples"), [("one", 1), ("lanczos", 5)])
def test_lanczos_agrees_within_its_residuals(folder, scenario, num_samples):
    record = load_records(folder / scenario / "home_0")[-1]
    dense = alone(Classifier(), left(folder, scenario)[0]["weights"], num_samples, target="prob", method="dense")
    assert record.method == "lanczos"
    assert record.eigenvalues.shape == (num_samples, 2, 4)
    assert record.converged.all()
    truth = np.concatenate([dense.eigenvalues[..., :2], dense.eigenvalues[..., -2:]], axis=-1)
    allowed = record.residuals + 1e-5 * dense.spectral_norm[..., None]
    assert (np.abs(record.eigenvalues - truth) <= allowed).all()
    assert (np.abs(record.trace - dense.trace) <= 5 * record.trace_error + 1e-5).all()
    assert record.hessian.shape == (min(2, num_samples), 2, 64, 64)
    whole = np.linalg.eigvalsh(record.hessian)[..., ::-1]
    np.testing.assert_allclose(whole, dense.eigenvalues[:2], atol=1e-5 * np.abs(whole).max())
    if scenario == "lanczos":
        assert record.density_nodes.shape[:2] == (5, 2)


@sharding
def test_sharded_parameters_are_gathered(folder):
    first, second = left(folder, "sharded")
    assert first["error"] is second["error"] is None
    records = load_records(folder / "sharded" / "home_0")
    assert [r.step for r in records] == list(range(5))
    assert_same(records[-1], alone(Sharded(), first["weights"], 3, heatmap_samples=2))


def test_a_failure_on_one_rank_warns_once_and_training_continues(folder):
    first, second = left(folder, "faulty")
    assert first["error"] is second["error"] is None
    shown = [w for w in first["warnings"] if BROKEN in w]
    assert len(shown) == 2  # at the measurement, and at the end of a fit without a record
    assert "ended without a single record" in shown[1]
    assert f"MeasurementError: On rank 1 of 2: ArithmeticError: {BROKEN}" in shown[0]
    assert not any(BROKEN in w for w in second["warnings"])
    assert first["metrics"].keys() == second["metrics"].keys() == {"val_loss"}
    assert not (folder / "faulty" / "home_0" / "input_hessian").exists()


@pytest.mark.parametrize(
    ("scenario", "kind", "message"),
    [
        ("raising", "MeasurementError", f"On rank 1 of 2: ArithmeticError: {BROKEN}"),
        ("all_raising", "MeasurementError", f"On rank 0 of 2: ArithmeticError: {BROKEN}"),
        (
            "bad_input",
            "MisconfigurationException",
            f"InputHessianMonitor: input_fn failed with ArithmeticError: {BROKEN}",
        ),
        ("bad_classes", "MisconfigurationException", "InputHessianMonitor: classes=[99] is out of range"),
    ],
)
def test_a_failure_that_ends_the_run_is_the_same_on_all_ranks(folder, scenario, kind, message):
    first, second = left(folder, scenario)
    assert first["error"] == second["error"]
    assert first["error"][0] == kind
    assert first["error"][1].startswith(message)


STEPS = {"prepare": 3, "decide": 4, "share": 5, "close": 6}  # how many collectives there are up to each


@pytest.mark.parametrize("name", SEQUENCES)
def test_the_collectives_of_a_measurement_are_those_written_down(folder, name):
    """On both ranks, also where one fails; and in a group of one."""
    documented = re.findall(r"\d\. ``(\w+)``", measure.__doc__)
    assert documented == ["tensors", "on_first", "on_all", "on_first", "on_all", "on_all", "gather", "on_all"]
    step = name.partition("_")[2]
    first, second = left(folder, name)
    alone = sequence(name, 0, 1)
    assert first["calls"] == second["calls"] == documented[: STEPS.get(step)]
    if not step:
        assert (first["record"], second["record"], alone["record"]) == (True, False, True)
        assert first["error"] is second["error"] is alone["error"] is None
        assert alone["calls"] == documented
        return
    rank = 0 if step == "decide" else 1
    assert first["error"] == second["error"] == ("MeasurementError", f"On rank {rank} of 2: ArithmeticError: {BROKEN}")
    assert alone["error"][1].startswith(f"ArithmeticError: {BROKEN}. The samples have the shape [3, 1, 8, 8]")
    assert (
        alone["calls"] == documented[: STEPS["close"] if step == "close" else min(4, STEPS[step])]
    )  # alone, it fails as it decides


def test_all_ranks_change_the_method_where_one_is_late(folder):
    first, second = left(folder, "late")
    change = ["any", "on_all"]
    assert first["calls"] == second["calls"]
    assert first["calls"][4:8] == ["on_all", *change, "on_all"]
    method, shape, message = first["record"]
    assert (method, shape) == ("lanczos", (3, 2, 4))
    assert "To stay within max_seconds=50, only the ends of the spectra were computed." in message
    assert second["record"] is None


def test_a_failure_in_writing_reaches_all(folder):
    first, second = left(folder, "unwritable")
    assert first["error"] is second["error"] is None
    assert any(f"failed. OSError: {BROKEN}" in w for w in first["warnings"])
    assert any(k.startswith("hessian") for k in second["metrics"])  # what was measured is known all the same


def test_a_rank_without_samples_measures_those_of_the_first(folder):
    first, second = left(folder, "no_samples_on_1")
    assert first["error"] is second["error"] is None
    assert [r.step for r in load_records(folder / "no_samples_on_1" / "home_0")] == [0, 2]


def test_missing_samples_on_the_first_rank_warn(folder):
    first, second = left(folder, "no_samples_on_0")
    assert first["error"] is second["error"] is None
    message = "On rank 0 of 2: its samples are the ones that are measured, and it has received no validation batch"
    shown = [w for w in first["warnings"] if message in w]
    assert ["ended without a single record" in w for w in shown] == [False, True]


def test_two_nodes_of_one_process_each(tmp_path):
    launch(tmp_path, "nodes", environments=NODES)
    first, second = left(tmp_path, "nodes")
    assert first["error"] is second["error"] is None
    assert_same(
        load_records(tmp_path / "nodes" / "home_0")[-1], alone(Classifier(), first["weights"], 3, heatmap_samples=2)
    )
    assert second["metrics"].keys() == first["metrics"].keys()


def test_processes_that_the_trainer_starts_itself(tmp_path):
    launch(tmp_path, "fork", "spawn", environments=[{}])
    for scenario in ("fork", "spawn"):
        result = torch.load(tmp_path / scenario / "rank_0.pt")
        assert result["error"] is None
        assert any(name.startswith("hessian_lambda_max/") for name in result["metrics"])
        expected = alone(Classifier(), result["weights"], 3, heatmap_samples=2)
        assert_same(load_records(tmp_path / scenario / "home_0")[-1], expected)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("num_samples", [1, 2, 3, 5, 8])
def test_shares_are_neighboring_even_and_everything(size, num_samples):
    shares = [list(range(num_samples))[ProcessGroup(rank, size).share(num_samples)] for rank in range(size)]
    assert list(chain(*shares)) == list(range(num_samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_with_flat_parameters_raise(name):
    """By the strategy's class or one that inherits from it, before the model is touched."""
    strategy = type("Own", (type(name, (), {}),), {})()
    with pytest.raises(ConfigurationError, match=r"Measuring under Own is not possible: .*ModelParallelStrategy"):
        process_group(SimpleNamespace(strategy=strategy, world_size=1))
