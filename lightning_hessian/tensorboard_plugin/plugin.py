"""The routes of the "Input Hessian" tab; http_api.md tells them in words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lightning_hessian.records.event_format import LAYOUT_VERSION, PLUGIN_NAME, pack
from lightning_hessian.records.record import Array
from lightning_hessian.tensorboard_plugin.files import RunFiles
from lightning_hessian.tensorboard_plugin.matrix import LARGEST_DRAWN, Matrix, draw, find_matrix
from lightning_hessian.tensorboard_plugin.question import number, text
from lightning_hessian.tensorboard_plugin.refusal import DamagedFile, Refused
from lightning_hessian.tensorboard_plugin.safe_file import SafeFile
from lightning_hessian.tensorboard_plugin.series import Summaries, Summary, curves, spectra
from lightning_hessian.tensorboard_plugin.statics import plotly_script, static_files

ANY_STEP = 10**12
LARGEST_SIZE = 2048
DEFAULT_SIZE = 784
DAY = 24 * 3600
TOO_LARGE = f"The matrix of {{}} inputs is too large to be drawn (more than {LARGEST_DRAWN}); single rows can be had."

Answer = Callable[[wrappers.Request], wrappers.Response]

logger = logging.getLogger("tensorboard")


@dataclass(frozen=True)
class Problem:
    """One (sample, class column) pair at one step, as a request names it."""

    run: str
    tag: str
    summary: Summary
    sample: int
    column: int


class InputHessianPlugin(base_plugin.TBPlugin):  # type: ignore[misc] # TensorBoard has no types
    """Serves measurements out of TensorBoard's data provider, and matrices out of the files beside the events."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._summaries = Summaries(context.data_provider)
        self._files = RunFiles(context.logdir, context.flags)

    def get_plugin_apps(self) -> dict[str, Any]:
        """Every route; files of the page each by its exact name."""
        answers: dict[str, Answer] = {
            "/runs": self._runs,
            "/series": self._series,
            "/spectra": self._spectra,
            "/summary": self._summary,
            "/problem": self._problem,
            "/matrix": self._matrix,
            "/row": self._row,
            "/plotly.min.js": _serve_plotly,
        }
        for name, (path, content_type) in static_files().items():
            # at both places, so that modules that import each other by relative names find each other from either
            answers[f"/{name}"] = answers[f"/static/{name}"] = _serve_file(path, content_type)
        return {route: _told_in_words(answer) for route, answer in answers.items()}

    def is_active(self) -> bool:
        """False: TensorBoard itself shows the tab as soon as there are data under the plugin's name."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The tab's name and the module that draws it."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Input Hessian")

    def _runs(self, request: wrappers.Request) -> wrappers.Response:
        ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        runs: list[dict[str, Any]] = []
        for run, tags in sorted(self._summaries.tags(ctx, experiment).items()):
            told: list[dict[str, Any]] = []
            for tag in tags:
                try:
                    found = dict(self._summaries.overview(ctx, experiment, run, tag))
                except Refused as refused:
                    told.append({"tag": tag, "steps": [], "epochs": [], "error": str(refused)})
                    continue
                why_none = self._files.why_none(run, tag)
                told.append({**found, "files": why_none is None, "why_no_files": why_none})
            runs.append({"run": run, "tags": told})
        return http_util.Respond(request, {"layout": LAYOUT_VERSION, "runs": runs}, "application/json")

    def _series(self, request: wrappers.Request) -> wrappers.Response:
        return _binary(request, *curves(self._asked_series(request)))

    def _spectra(self, request: wrappers.Request) -> wrappers.Response:
        series = self._asked_series(request)
        sample, column = _indices(request, series.summaries[-1])
        meta = {"histogram": [s.meta.get("histogram") for s in series.summaries], "left_out": series.left_out}
        return _binary(request, spectra(series, sample, column), meta)

    def _summary(self, request: wrappers.Request) -> wrappers.Response:
        series = self._asked_series(request)
        summary = series.at(number(request, "step", ANY_STEP))
        return _binary(request, summary.arrays, {**summary.meta, "logged_step": summary.logged_step})

    def _problem(self, request: wrappers.Request) -> wrappers.Response:
        problem = self._asked_problem(request)
        with self._opened(problem) as file:
            at = (problem.sample, problem.column)
            arrays = {"x": file.read("x", problem.sample)}
            arrays |= {name: file.read(name, *at) for name in ("gradient", "diagonal", "diagonal_error")}
            if "eigenvectors" in file and "vector_index" in file:
                index = file.read("vector_index", *at)
                arrays["eigenvectors"] = file.read("eigenvectors", *at)
                for name in ("eigenvalues", "residuals", "converged"):
                    listed = file.read(name, *at)
                    if len(index) != len(arrays["eigenvectors"]) or ((index < 0) | (index >= len(listed))).any():
                        raise DamagedFile("eigenvectors do not fit eigenvalues")
                    arrays[f"eigenvector_{name.removeprefix('eigen')}"] = listed[index]
            matrix = self._find(file, problem)
        told = _about(matrix) if isinstance(matrix, Matrix) else {"matrix": "none", "why_not": matrix}
        meta = {**problem.summary.meta, "shape": list(arrays["x"].shape), **told}
        return _binary(request, arrays, meta)

    def _matrix(self, request: wrappers.Request) -> wrappers.Response:
        problem = self._asked_problem(request)
        size = number(request, "size", LARGEST_SIZE + 1, least=1, default=DEFAULT_SIZE)
        with self._opened(problem) as file:
            matrix = self._found(file, problem)
            if matrix.num_inputs > LARGEST_DRAWN:
                raise Refused(404, TOO_LARGE.format(matrix.num_inputs))
            return _binary(request, draw(matrix, size), _about(matrix))

    def _row(self, request: wrappers.Request) -> wrappers.Response:
        problem = self._asked_problem(request)
        with self._opened(problem) as file:
            matrix = self._found(file, problem)
            index = number(request, "index", matrix.num_inputs)
            arrays = {"row": matrix.rows(index, index + 1)[0], "index": np.array(index, np.int32)}
            return _binary(request, arrays, _about(matrix))

    def _asked_series(self, request: wrappers.Request) -> Any:
        ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        return self._summaries.read(ctx, experiment, text(request, "run"), text(request, "tag"))

    def _asked_problem(self, request: wrappers.Request) -> Problem:
        summary = self._asked_series(request).at(number(request, "step", ANY_STEP))
        return Problem(text(request, "run"), text(request, "tag"), summary, *_indices(request, summary))

    def _opened(self, problem: Problem) -> AbstractContextManager[SafeFile]:
        return self._files.open(problem.run, problem.tag, problem.summary.meta["step"])

    def _find(self, file: SafeFile, problem: Problem) -> Matrix | str:
        """The problem's matrix, or why there is none."""
        expected = (*problem.summary.shape, problem.summary.meta["num_inputs"])
        of_event = (file.meta or {}).get("logged_step") == problem.summary.logged_step
        sessions = {_session(file.meta or {}), _session(problem.summary.meta)} - {None}
        if not of_event or len(sessions) > 1 or file.shape("gradient") != expected:
            raise DamagedFile("it is of another measurement than the event")
        kept = problem.summary.meta.get("kept")
        return find_matrix(file, problem.sample, problem.column, kept if isinstance(kept, dict) else {})

    def _found(self, file: SafeFile, problem: Problem) -> Matrix:
        matrix = self._find(file, problem)
        if isinstance(matrix, str):
            raise Refused(404, matrix)
        return matrix


def _indices(request: wrappers.Request, summary: Summary) -> tuple[int, int]:
    num_samples, num_columns = summary.shape
    return number(request, "sample", num_samples), number(request, "column", num_columns)


def _session(meta: Mapping[str, Any]) -> str | None:
    """Which start of a run wrote an event or a file; None where that is not known."""
    session = meta.get("session")
    told = session.get("id") if isinstance(session, dict) else None
    return told if isinstance(told, str) and told else None


def _about(matrix: Matrix) -> dict[str, Any]:
    return {"matrix": matrix.source, "why_not": None, "precision": matrix.precision}


def _binary(request: wrappers.Request, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> wrappers.Response:
    """Arrays as safetensors, with ``meta`` as JSON: NaN and infinity stay what they are."""
    return http_util.Respond(request, pack(arrays, meta), "application/octet-stream")


def _serve_file(path: Path, content_type: str) -> Answer:
    def answer(request: wrappers.Request) -> wrappers.Response:
        return http_util.Respond(request, path.read_bytes(), content_type)

    return answer


def _serve_plotly(request: wrappers.Request) -> wrappers.Response:
    return http_util.Respond(request, plotly_script(), "text/javascript", content_encoding="gzip", expires=DAY)


def _told_in_words(answer: Answer) -> Any:
    """A WSGI application that says in JSON why there is no answer, where there is none."""

    def answered(request: wrappers.Request) -> wrappers.Response:
        if request.method not in ("GET", "HEAD"):
            return _error(request, 405, "This address is only for reading.")
        try:
            return answer(request)
        except Refused as refused:
            return _error(request, refused.status, str(refused))
        except errors.PublicError as error:
            return _error(request, error.http_code, str(error))
        except Exception as error:
            logger.exception("Input Hessian: no answer to %s", request.path)
            return _error(request, 500, f"TensorBoard could not answer: {type(error).__name__}; its log says more.")

    return wrappers.Request.application(answered)


def _error(request: wrappers.Request, status: int, sentence: str) -> wrappers.Response:
    return http_util.Respond(request, {"error": sentence}, "application/json", code=status)
