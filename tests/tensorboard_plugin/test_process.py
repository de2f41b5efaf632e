"""A real TensorBoard with either of its loaders, under a path prefix, finds the tab and serves it."""

import dataclasses
import json
import time
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
from support.browsing import tensorboard
from support.make_run import START, later, train, unpack, write_run

from lightning_hessian.records.matrices import from_triangle

PATIENCE = 120  # seconds, on a busy machine
STEPS = {"deep/resumed": [0, 9, 14], "long": [10 * i for i in range(130)]}  # logged ones, when all has been read


@pytest.fixture(scope="module")
def records():
    return train()


@pytest.fixture(scope="module")
def logdir(records, tmp_path_factory):
    """A run that was resumed from step 9 (19 is superseded), and one of more steps than TensorBoard keeps by itself."""
    logdir = tmp_path_factory.mktemp("logs")
    write_run(logdir / "deep" / "resumed", records)
    resumed = [dataclasses.replace(records[2], step=step + 1, logged_step=step) for step in (9, 14)]
    write_run(logdir / "deep" / "resumed", resumed, start=START + 100)
    write_run(logdir / "long", [later(records[:1], step=10 * i)[0] for i in range(130)], files=False)
    return logdir


@pytest.fixture(scope="module", params=["true", "false"])
def address(request, logdir):
    """The plugin's address at a running TensorBoard that has read everything."""
    with tensorboard(logdir, "--path_prefix=/below", f"--load_fast={request.param}") as server:
        plugin = f"{server}data/plugin/input_hessian"
        until = time.monotonic() + PATIENCE
        while {run["run"]: tag["steps"] for run in runs(plugin) for tag in run["tags"]} != STEPS:
            assert time.monotonic() < until, runs(plugin)
            time.sleep(0.2)
        yield plugin


def get(address: str, **arguments: object) -> bytes:
    with urlopen(f"{address}?{urlencode(arguments)}") as answer:
        return answer.read()


def runs(plugin: str) -> list[dict]:
    return json.loads(get(f"{plugin}/runs"))["runs"]


def test_the_tab_is_there(address):
    listing = json.loads(get(address.replace("plugin/input_hessian", "plugins_listing")))
    assert listing["input_hessian"]["enabled"]
    assert listing["input_hessian"]["tab_name"] == "Input Hessian"
    assert listing["input_hessian"]["loading_mechanism"]["module_path"].endswith("/data/plugin/input_hessian/index.js")


def test_both_loaders_show_the_same_steps(address):
    assert [(run["run"], run["tags"][0]["files"]) for run in runs(address)] == [("deep/resumed", True), ("long", False)]
    assert [len(run["tags"][0]["steps"]) for run in runs(address)] == [3, 130]
    assert runs(address)[0]["tags"][0]["steps"] == [0, 9, 14]


def test_series_and_matrix(address, records):
    which = {"run": "deep/resumed", "tag": "input_hessian"}
    arrays, _ = unpack(get(f"{address}/series", **which))
    expected = np.stack([records[i].trace for i in (0, 2, 2)]).astype(np.float32)
    np.testing.assert_array_equal(arrays["trace"], expected)
    drawn, _ = unpack(get(f"{address}/matrix", **which, step=14, sample=0, class_id=3))
    np.testing.assert_array_equal(from_triangle(drawn["triangle"], 9), records[2].hessian[0, 1])


@pytest.mark.parametrize(
    "path", ["/static/../plugin.py", "/static/..%2fplugin.py", "/static/%2e%2e/plugin.py", "/plugin.py", "/static/"]
)
def test_other_files_are_not_served(address, path):
    with pytest.raises(HTTPError) as caught:
        get(address + path)
    with caught.value as answer:
        assert answer.code == 404


def test_an_encoded_run_outside_is_an_error(address):
    with pytest.raises(HTTPError) as caught:
        get(f"{address}/maps", run="deep/../deep/resumed", tag="input_hessian", step=9, sample=0, class_id=1)
    with caught.value as answer:
        assert answer.code == 404
        assert json.loads(answer.read())["error"] == "There is no run 'deep/../deep/resumed'."
