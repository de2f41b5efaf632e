"""The command ``lightning-hessian``."""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning_hessian._version import __version__
from lightning_hessian.errors import HessianWarning, MeasurementError, WritingError
from lightning_hessian.report.page import MAX_SIZE, write_report

PYTHON_ONLY = re.compile(r"\b(input_fn|forward_fn|output_fn)\b")
INSTEAD = (
    "The command has no {}: save the samples as the model takes them, with --wrt for one of several inputs, or give a "
    "function, MODULE:FUNCTION, whose module does the rest."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; an error is one sentence on stderr and exit status 1."""
    options = vars(_parser().parse_args(arguments))
    with warnings.catch_warnings():
        show = warnings.showwarning
        warnings.showwarning = partial(_show_warning, show)
        try:
            options.pop("run")(**options)
        except (OSError, ValueError, MeasurementError, WritingError) as error:
            _complain(str(error))
            return 1
    return 0


def _complain(message: str) -> None:
    print(f"lightning-hessian: {_for_command(message)}", file=sys.stderr, flush=True)


def _show_warning(show: Callable[..., object], message: Warning | str, category: type[Warning], *where: Any) -> None:
    """Shows a warning of this package as a sentence: no line of a user's caused it."""
    if issubclass(category, HessianWarning):
        _complain(str(message))
    else:
        show(message, category, *where)


def _for_command(message: str) -> str:
    """A message that may name arguments of Python, for someone who has the command only."""
    named = sorted(set(PYTHON_ONLY.findall(message)))
    return f"{message} {INSTEAD.format(' or '.join(named))}" if named else message


def _report(log_dirs: list[str], output: str, max_size: float) -> None:
    path = write_report(log_dirs, output, max_size=max_size)
    print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB). Open it in a browser.")


def _measure(classes: list[str], **options: Any) -> None:
    from lightning_hessian.offline import measure_checkpoints  # loads torch

    given = {name: value for name, value in options.items() if value is not None}
    measure_checkpoints(**given, classes=_classes(classes), say=_say)


def _say(message: str) -> None:
    print(_for_command(message), flush=True)


def _classes(words: list[str]) -> int | list[int] | str:
    """``--classes 2 3``, ``--classes label``."""
    try:
        return [int(word) for word in words]
    except ValueError:
        return " ".join(words)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-hessian", description="Measures input Hessians from checkpoints, and writes reports."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="write a standalone page about some runs, to mail or to attach to a paper",
        description="Writes one HTML page with everything that the Input Hessian tab of TensorBoard shows about some "
        "runs. It needs neither a network nor TensorBoard.",
    )
    report.set_defaults(run=_report)
    report.add_argument("log_dirs", nargs="+", metavar="LOG_DIR", help="directory of a run, or one above several runs")
    report.add_argument(
        "-o",
        "--output",
        default="report.html",
        metavar="FILE",
        help="default: %(default)s; an existing file is replaced",
    )
    report.add_argument(
        "--max-size",
        type=float,
        default=MAX_SIZE,
        metavar="MB",
        help="largest size of the page; it says what was left out (default: %(default)g)",
    )
    measure = commands.add_parser(
        "measure",
        help="measure the checkpoints of a run, even while it saves more",
        description="Measures the input Hessians of saved checkpoints in a separate process and on any device, with "
        "the same numbers that InputHessianMonitor would have logged during the run, but at no cost to it. Skips "
        "checkpoints that were already measured.",
    )
    _add_measure(measure)
    return parser


def _add_measure(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``offline.measure_checkpoints``; those that are left out have its defaults."""
    parser.set_defaults(run=_measure)
    add = parser.add_argument
    add(
        "model",
        metavar="MODULE:CLASS",
        help="a LightningModule, or a class or function without arguments that returns a model for a state dict",
    )
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a file, a pattern such as 'runs/*.ckpt', or a directory")
    add(
        "--samples",
        required=True,
        metavar="FILE",
        help=".pt, .npz or .safetensors with x or (x, labels); or the word checkpoint, for the samples that "
        "the run's own InputHessianMonitor stored",
    )
    add("--log-dir", required=True, metavar="DIR", help="directory for these measurements and nothing else")
    add(
        "--classes",
        nargs="+",
        default=["label"],
        metavar="CLASS",
        help="ints, label, predicted or all (default: label)",
    )
    add("--target", help="logit, log_prob, prob, loss or margin (default: chosen by the kind of network)")
    add("--device", help="such as cuda:1 (default: a CUDA device if there is one, else cpu)")
    add("--watch", action="store_true", help="keep measuring new checkpoints until training has ended")
    add("--poll", type=float, metavar="SECONDS", help="time between two checks for new checkpoints (default: 5)")
    add(
        "--patience",
        type=float,
        metavar="SECONDS",
        help="end a watch no earlier than this after the last change (default: 60)",
    )
    add(
        "--num-samples",
        type=int,
        metavar="N",
        help="measure the first N samples (default: 8; with --samples checkpoint, all)",
    )
    add("--sample-indices", type=int, nargs="+", metavar="I", help="measure these samples")
    add(
        "--heatmap-samples", type=int, metavar="N", help="number of samples whose whole matrices are drawn (default: 1)"
    )
    add("--method", choices=["auto", "dense", "low_rank", "lanczos"], help="how spectra are computed (default: auto)")
    add("--num-eigenvalues", type=int, metavar="N", help="number of eigenvectors, those of largest |λ| (default: 10)")
    add("--density-vectors", type=int, metavar="N", help="random vectors for the density of eigenvalues (default: 0)")
    add("--dtype", choices=["float32", "float64"], help="precision of the measurement (default: float32)")
    add(
        "--wrt",
        metavar="NAME",
        help="the variable: one of several inputs, by name or position, or a submodule",
    )
    add("--max-memory", type=int, metavar="BYTES", help="memory that may be used (default: half of what is free)")
    add("--max-seconds", type=float, metavar="SECONDS", help="time limit of each measurement")
    add("--class-names", nargs="+", metavar="NAME", help="a name for every output, shown in place of its number")
    add("--seed", type=int, help="of all random vectors (default: 0)")
    add("--name", help="in tags and folders; with --samples checkpoint, the name of the monitor")


if __name__ == "__main__":
    sys.exit(main())
