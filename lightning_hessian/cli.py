"""The command ``lightning-hessian``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_hessian._version import __version__
from lightning_hessian.report.page import MAX_SIZE, write_report


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; an error is one sentence on stderr and exit status 1."""
    options = _parser().parse_args(arguments)
    try:
        path = write_report(options.log_dirs, options.output, max_size=options.max_size)
    except (OSError, ValueError) as error:
        print(f"lightning-hessian: {error}", file=sys.stderr)
        return 1
    print(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB). Open it in a browser.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-hessian", description="Works with the input-Hessians that runs have saved."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    report = commands.add_parser(
        "report",
        help="write a standalone page about some runs, to attach to a mail or a paper",
        description="Writes one HTML page with everything that the Input Hessian tab of TensorBoard shows about some "
        "runs. It needs neither a network nor TensorBoard.",
    )
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
        help="largest size of the page, which says what was left out (default: %(default)g)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
