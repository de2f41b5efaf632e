"""Imports run one way: a fresh process imports each room, and tells what came along."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "lightning", "pytorch_lightning", "tensorboard", "matplotlib", "safetensors", "pandas", "plotly"}

ALLOWED = {
    "lightning_hessian": set(),
    "lightning_hessian.errors": set(),
    "lightning_hessian.schedule": set(),
    "lightning_hessian.progress": set(),
    "lightning_hessian.curvature.progress": set(),
    "lightning_hessian.drift": set(),
    "lightning_hessian.record": set(),
    "lightning_hessian.histogram": set(),
    "lightning_hessian.layout": set(),
    "lightning_hessian.matrices": set(),
    "lightning_hessian.keep_matrices": set(),
    "lightning_hessian.picture_scale": set(),
    "lightning_hessian.record_files": {"safetensors"},
    "lightning_hessian.dataframe": {"safetensors"},
    "lightning_hessian.report": {"safetensors", "plotly"},
    "lightning_hessian.cli": {"safetensors", "plotly"},
    "lightning_hessian.render.composite": {"matplotlib"},
    "lightning_hessian.render.figures": {"matplotlib"},
    "lightning_hessian.writers.scalars": set(),
    "lightning_hessian.writers.background": set(),
    "lightning_hessian.writers.loggers": set(),
    "lightning_hessian.writers.publish": {"safetensors", "matplotlib"},
    "lightning_hessian.tensorboard_plugin.loader": {"tensorboard"},
    "lightning_hessian.tensorboard_plugin.plugin": {"tensorboard"},
    "lightning_hessian.curvature.measure": {"torch"},
    "lightning_hessian.curvature.plan": {"torch"},
    "lightning_hessian.curvature.diagnosis": {"torch"},
    "lightning_hessian.targets": {"torch"},
    "lightning_hessian.model_function": {"torch"},
    "lightning_hessian.isolation": {"torch"},
    "lightning_hessian.probe": {"torch"},
    "lightning_hessian.functional": {"torch"},
    "lightning_hessian.monitor": {"torch"},
    "lightning_hessian.resume": {"torch"},
    "lightning_hessian.distribution": {"torch"},
    "lightning_hessian.curvature.join": {"torch"},
    "lightning_hessian.trainer_facts": {"torch", "safetensors", "matplotlib"},
}

# What a room may know of its own house, besides itself and errors.
NEIGHBOURS = {
    "lightning_hessian.curvature.measure": {"curvature"},
    "lightning_hessian.curvature.plan": {"curvature"},
    "lightning_hessian.schedule": set(),
    "lightning_hessian.progress": set(),
    "lightning_hessian.curvature.join": {"curvature"},
    "lightning_hessian.distribution": {"curvature"},
    "lightning_hessian.targets": set(),
    "lightning_hessian.model_function": set(),
    "lightning_hessian.isolation": {"keeper"},
    "lightning_hessian.drift": set(),
    "lightning_hessian.record": {"matrices"},
    "lightning_hessian.matrices": set(),
    "lightning_hessian.picture_scale": set(),
    "lightning_hessian.histogram": set(),
    "lightning_hessian.layout": {"histogram"},
    "lightning_hessian.tensorboard_plugin.plugin": {"record", "layout", "histogram", "matrices"},
    "lightning_hessian.record_files": {"record", "matrices", "keep_matrices", "layout", "histogram"},
    "lightning_hessian.render.composite": {"record", "matrices", "picture_scale"},
    "lightning_hessian.render.figures": {"record", "matrices", "picture_scale"},
    "lightning_hessian.dataframe": {"record", "matrices", "layout", "histogram"},
    "lightning_hessian.report": {
        "record",
        "matrices",
        "keep_matrices",
        "record_files",
        "layout",
        "histogram",
        "report_data",
    },
    "lightning_hessian.writers.publish": {
        "record",
        "record_files",
        "keep_matrices",
        "matrices",
        "picture_scale",
        "render",
        "layout",
        "histogram",
    },
    "lightning_hessian.functional": {
        "curvature",
        "targets",
        "model_function",
        "isolation",
        "keeper",
        "preparation",
    },
}


def modules_after(statement: str) -> set[str]:
    """The names of all modules loaded in a fresh process after ``statement``."""
    code = f"{statement}\nimport sys; print('\\n'.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def loaded_heavy(statement: str) -> set[str]:
    return modules_after(statement) & HEAVY


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_loads_only_what_it_may(room):
    assert loaded_heavy(f"import {room}") <= ALLOWED[room]


def rooms_after(statement: str) -> set[str]:
    return {m.split(".")[1] for m in modules_after(statement) if m.startswith("lightning_hessian.")}


@pytest.mark.parametrize("room", NEIGHBOURS)
def test_a_room_knows_only_its_neighbours(room):
    own = room.split(".")[1]
    assert rooms_after(f"import {room}") <= NEIGHBOURS[room] | {own, "errors"}


def test_the_check_of_neighbours_can_fail():
    assert "record" in rooms_after("import lightning_hessian.curvature.measure, lightning_hessian.record")


@pytest.mark.parametrize("culprit", ["torch", "lightning"])
def test_the_check_can_fail(culprit):
    assert culprit in loaded_heavy(f"import lightning_hessian, {culprit}")


def test_the_callback_is_imported_by_nothing_but_its_name():
    assert "lightning_hessian.callback" not in modules_after("import lightning_hessian.monitor")
    assert "lightning" in loaded_heavy("from lightning_hessian import InputHessianMonitor")


def test_an_unknown_name_is_an_attribute_error():
    import lightning_hessian

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_hessian.nothing
    assert set(lightning_hessian.__all__) <= set(dir(lightning_hessian))
