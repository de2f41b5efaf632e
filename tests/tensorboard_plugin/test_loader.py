"""What TensorBoard does with the entry point, and what it may load."""

import argparse
import subprocess
import sys

import pytest

from lightning_hessian.records.event_format import PLUGIN_NAME
from lightning_hessian.tensorboard_plugin import loader
from lightning_hessian.tensorboard_plugin.loader import InputHessianLoader

HEAVY = {"torch", "lightning", "pytorch_lightning", "matplotlib", "plotly"}
WHOLE = """
import argparse, sys
from tensorboard.plugins import base_plugin
from lightning_hessian.tensorboard_plugin.loader import InputHessianLoader
context = base_plugin.TBContext(flags=argparse.Namespace(logdir_spec=""), logdir=".")
plugin = InputHessianLoader().load(context)
from werkzeug.test import Client
assert Client(plugin.get_plugin_apps()["/plotly.min.js"]).get("/").status_code == 200
"""


def loaded(code: str) -> set[str]:
    output = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(output.stdout.split())


def test_the_entry_point_and_the_plugin_load_nothing_heavy():
    assert not loaded(WHOLE) & HEAVY


def test_the_entry_point_alone_loads_nothing_that_may_fail():
    modules = loaded("from lightning_hessian.tensorboard_plugin.loader import InputHessianLoader")
    assert not modules & (HEAVY | {"safetensors", "lightning_hessian.tensorboard_plugin.plugin"})


def test_the_check_can_fail():
    assert "matplotlib" in loaded(f"{WHOLE}\nimport matplotlib") & HEAVY


def test_the_name_is_one():
    assert loader.PLUGIN_NAME == PLUGIN_NAME


@pytest.mark.parametrize(
    ("given", "expected"), [({}, {"input_hessian": 1000}), ({"input_hessian": 5, "x": 1}, {"input_hessian": 5, "x": 1})]
)
def test_samples_per_plugin(given, expected):
    flags = argparse.Namespace(samples_per_plugin=given)
    InputHessianLoader().fix_flags(flags)
    assert flags.samples_per_plugin == expected


def test_flags_of_another_tensorboard_do_not_matter():
    InputHessianLoader().fix_flags(argparse.Namespace())
    InputHessianLoader().fix_flags(argparse.Namespace(samples_per_plugin=None))


def test_a_failure_is_logged_and_tensorboard_goes_on(caplog):
    assert InputHessianLoader().load(None) is None
    assert "There is no Input Hessian tab: AttributeError" in caplog.text
