"""Imports run one way: a fresh process imports each room, and tells what came along."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "lightning", "pytorch_lightning", "tensorboard", "matplotlib", "safetensors", "pandas", "plotly"}

ALLOWED = {
    "lightning_hessian": set(),
    "lightning_hessian.errors": set(),
    "lightning_hessian.training.schedule": set(),
    "lightning_hessian.training.progress": set(),
    "lightning_hessian.curvature.progress": set(),
    "lightning_hessian.records.subspace": set(),
    "lightning_hessian.records.record": set(),
    "lightning_hessian.records.histogram": set(),
    "lightning_hessian.records.event_format": set(),
    "lightning_hessian.records.matrices": set(),
    "lightning_hessian.records.retention": set(),
    "lightning_hessian.records.color_scale": set(),
    "lightning_hessian.records.files": {"safetensors"},
    "lightning_hessian.records.dataframe": {"safetensors"},
    "lightning_hessian.report.page": {"safetensors", "plotly"},
    "lightning_hessian.cli": {"safetensors", "plotly"},
    "lightning_hessian.render.composite": {"matplotlib"},
    "lightning_hessian.render.plots": {"matplotlib"},
    "lightning_hessian.writers.scalars": set(),
    "lightning_hessian.writers.background": set(),
    "lightning_hessian.writers.loggers": set(),
    "lightning_hessian.writers.publisher": {"safetensors", "matplotlib"},
    "lightning_hessian.tensorboard_plugin.loader": {"tensorboard"},
    "lightning_hessian.tensorboard_plugin.plugin": {"tensorboard"},
    "lightning_hessian.curvature.methods.execute": {"torch"},
    "lightning_hessian.curvature.methods.plan": {"torch"},
    "lightning_hessian.curvature.checks.diagnosis": {"torch"},
    "lightning_hessian.model.targets": {"torch"},
    "lightning_hessian.model.function": {"torch"},
    "lightning_hessian.model.isolation": {"torch"},
    "lightning_hessian.training.samples": {"torch"},
    "lightning_hessian.functional": {"torch"},
    "lightning_hessian.training.measurement": {"torch"},
    "lightning_hessian.training.resume": {"torch"},
    "lightning_hessian.training.distributed": {"torch"},
    "lightning_hessian.curvature.methods.merge": {"torch"},
    "lightning_hessian.training.trainer_access": {"torch", "safetensors", "matplotlib"},
}

# What a room may know of its own house, besides itself and errors.
NEIGHBOURS = {
    "lightning_hessian.curvature.methods.execute": {"curvature"},
    "lightning_hessian.curvature.methods.plan": {"curvature"},
    "lightning_hessian.training.schedule": set(),
    "lightning_hessian.training.progress": set(),
    "lightning_hessian.curvature.methods.merge": {"curvature"},
    "lightning_hessian.training.distributed": {"curvature"},
    "lightning_hessian.model.targets": set(),
    "lightning_hessian.model.function": set(),
    "lightning_hessian.model.isolation": {"keeper"},
    "lightning_hessian.records.subspace": set(),
    "lightning_hessian.records.record": {"matrices"},
    "lightning_hessian.records.matrices": set(),
    "lightning_hessian.records.color_scale": set(),
    "lightning_hessian.records.histogram": set(),
    "lightning_hessian.records.event_format": {"histogram"},
    "lightning_hessian.tensorboard_plugin.plugin": {"record", "layout", "histogram", "matrices"},
    "lightning_hessian.records.files": {"record", "matrices", "keep_matrices", "layout", "histogram"},
    "lightning_hessian.render.composite": {"record", "matrices", "picture_scale"},
    "lightning_hessian.render.plots": {"record", "matrices", "picture_scale"},
    "lightning_hessian.records.dataframe": {"record", "matrices", "layout", "histogram"},
    "lightning_hessian.report.page": {
        "record",
        "matrices",
        "keep_matrices",
        "record_files",
        "layout",
        "histogram",
        "report_data",
    },
    "lightning_hessian.writers.publisher": {
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
    assert "record" in rooms_after(
        "import lightning_hessian.curvature.methods.execute, lightning_hessian.records.record"
    )


@pytest.mark.parametrize("culprit", ["torch", "lightning"])
def test_the_check_can_fail(culprit):
    assert culprit in loaded_heavy(f"import lightning_hessian, {culprit}")


def test_the_callback_is_imported_by_nothing_but_its_name():
    assert "lightning_hessian.callback" not in modules_after("import lightning_hessian.training.measurement")
    assert "lightning" in loaded_heavy("from lightning_hessian import InputHessianMonitor")


def test_an_unknown_name_is_an_attribute_error():
    import lightning_hessian

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightning_hessian.nothing
    assert set(lightning_hessian.__all__) <= set(dir(lightning_hessian))
