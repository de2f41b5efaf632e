"""How curved is what a network computes, around the inputs it will meet?

``InputHessianMonitor`` is a Lightning callback that measures the Hessian of selected class outputs with
respect to the *input* on held-out samples during training; ``InputHessianRecorder`` does the same in any other loop.
``input_gradient``, ``input_hvp``, ``input_hessian`` and ``input_spectrum`` are plain functions, and
``input_hessian_operator`` gives the Hessians as linear operators. Importing this package loads
neither torch nor Lightning: each public name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_hessian._version import __version__ as __version__

_HOME = {
    "InputHessianMonitor": "callback",
    "InputHessianRecorder": "recorder",
    "KeepMatrices": "records.retention",
    "input_gradient": "functional",
    "input_hvp": "functional",
    "input_hessian": "functional",
    "input_spectrum": "functional",
    "input_hessian_operator": "operator",
    "ConfigurationError": "errors",
    "MeasurementError": "errors",
    "Spectrum": "curvature.spectrum",
    "Record": "records.record",
    "load_records": "records.files",
    "plot_spectrum": "render.plots",
    "plot_hessian": "render.plots",
    "plot_input": "render.plots",
    "to_dataframe": "records.dataframe",
    "write_report": "report.page",
}

__all__ = [
    "ConfigurationError",
    "InputHessianMonitor",
    "InputHessianRecorder",
    "KeepMatrices",
    "MeasurementError",
    "Record",
    "Spectrum",
    "input_gradient",
    "input_hessian",
    "input_hessian_operator",
    "input_hvp",
    "input_spectrum",
    "load_records",
    "plot_hessian",
    "plot_input",
    "plot_spectrum",
    "to_dataframe",
    "write_report",
]

if TYPE_CHECKING:
    from lightning_hessian.callback import InputHessianMonitor
    from lightning_hessian.curvature.spectrum import Spectrum
    from lightning_hessian.errors import ConfigurationError, MeasurementError
    from lightning_hessian.functional import input_gradient, input_hessian, input_hvp, input_spectrum
    from lightning_hessian.operator import input_hessian_operator
    from lightning_hessian.recorder import InputHessianRecorder
    from lightning_hessian.records.dataframe import to_dataframe
    from lightning_hessian.records.files import load_records
    from lightning_hessian.records.record import Record
    from lightning_hessian.records.retention import KeepMatrices
    from lightning_hessian.render.plots import plot_hessian, plot_input, plot_spectrum
    from lightning_hessian.report.page import write_report


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
