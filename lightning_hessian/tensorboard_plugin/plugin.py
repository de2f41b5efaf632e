"""The routes of the "Input Hessian" tab; http_api.md describes them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard import errors, plugin_util
from tensorboard.backend import http_util
from tensorboard.plugins import base_plugin
from werkzeug import wrappers

from lightning_hessian.records.answers import history, matrix, sample
from lightning_hessian.records.event_format import EVENT_FORMAT_VERSION, PLUGIN_NAME, Summary
from lightning_hessian.records.payload import ArrayFile, pack
from lightning_hessian.tensorboard_plugin.events import Histories
from lightning_hessian.tensorboard_plugin.files import RunFiles
from lightning_hessian.tensorboard_plugin.request import RequestError, class_index, number, text
from lightning_hessian.tensorboard_plugin.static_files import plotly_script, static_files

ANY_STEP = 10**12
LARGEST_SIZE = 2048
DAY = 24 * 3600

Route = Callable[[wrappers.Request], wrappers.Response]

logger = logging.getLogger("tensorboard")


class InputHessianPlugin(base_plugin.TBPlugin):  # type: ignore[misc] # TensorBoard has no types
    """Serves measurements out of TensorBoard's data provider, and matrices out of the files beside the events."""

    plugin_name = PLUGIN_NAME

    def __init__(self, context: base_plugin.TBContext) -> None:
        self._histories = Histories(context.data_provider)
        self._files = RunFiles(context.logdir, context.flags)

    def get_plugin_apps(self) -> dict[str, Any]:
        """Every route; files of the page each by its exact name."""
        binary = {
            "/series": self._series,
            "/spectra": self._spectra,
            "/input": self._input,
            "/maps": self._maps,
            "/matrix": self._matrix,
            "/row": self._row,
        }
        routes: dict[str, Route] = {"/runs": self._runs, "/plotly.min.js": _serve_plotly}
        routes |= {name: _binary(answer) for name, answer in binary.items()}
        for name, (path, content_type) in static_files().items():
            # under both, so that modules that import each other by relative names find each other from either
            routes[f"/{name}"] = routes[f"/static/{name}"] = _serve_file(path, content_type)
        return {name: _with_json_errors(route) for name, route in routes.items()}

    def is_active(self) -> bool:
        """False: TensorBoard itself shows the tab as soon as there is data under the plugin's name."""
        return False

    def frontend_metadata(self) -> base_plugin.FrontendMetadata:
        """The tab's name and the module that draws it."""
        return base_plugin.FrontendMetadata(es_module_path="/index.js", tab_name="Input Hessian")

    def _runs(self, request: wrappers.Request) -> wrappers.Response:
        ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        runs: list[dict[str, Any]] = []
        for run, tags in sorted(self._histories.tags(ctx, experiment).items()):
            entries: list[dict[str, Any]] = []
            for tag in tags:
                try:
                    found = self._histories.describe(ctx, experiment, run, tag)
                except RequestError as error:
                    entries.append({"tag": tag, "steps": [], "epochs": [], "error": str(error)})
                    continue
                why_none = self._files.why_none(run, tag)
                entries.append({**found, "files": why_none is None, "why_no_files": why_none})
            runs.append({"run": run, "tags": entries})
        answer = {"format": EVENT_FORMAT_VERSION, "metrics": history.metric_table(), "runs": runs}
        return http_util.Respond(request, answer, "application/json")

    def _series(self, request: wrappers.Request) -> history.Answer:
        return history.series(self._history(request))

    def _spectra(self, request: wrappers.Request) -> history.Answer:
        measured = self._history(request)
        return history.spectra(measured, *_sample_and_class(request, measured.summaries[-1]))

    def _input(self, request: wrappers.Request) -> history.Answer:
        with self._file(request) as (file, summary):
            return sample.input_of(file, number(request, "sample", summary.shape[0]))

    def _maps(self, request: wrappers.Request) -> history.Answer:
        with self._file(request) as (file, summary):
            return sample.maps(file, summary, *_sample_and_class(request, summary))

    def _matrix(self, request: wrappers.Request) -> history.Answer:
        max_cells = number(request, "size", LARGEST_SIZE + 1, least=1, default=matrix.MAX_CELLS)
        with self._file(request) as (file, summary):
            return matrix.matrix(matrix.read_matrix(file, summary, *_sample_and_class(request, summary)), max_cells)

    def _row(self, request: wrappers.Request) -> history.Answer:
        with self._file(request) as (file, summary):
            index = number(request, "index", summary.meta["num_inputs"])
            return matrix.row(matrix.read_matrix(file, summary, *_sample_and_class(request, summary)), index)

    def _history(self, request: wrappers.Request) -> history.History:
        ctx, experiment = plugin_util.context(request.environ), plugin_util.experiment_id(request.environ)
        return self._histories.read(ctx, experiment, text(request, "run"), text(request, "tag"))

    @contextmanager
    def _file(self, request: wrappers.Request) -> Iterator[tuple[ArrayFile, Summary]]:
        summary = self._history(request).at(number(request, "step", ANY_STEP))
        with self._files.open(text(request, "run"), text(request, "tag"), summary) as file:
            yield file, summary


def _sample_and_class(request: wrappers.Request, summary: Summary) -> tuple[int, int]:
    return number(request, "sample", summary.shape[0]), class_index(request, summary)


def _binary(answer: Callable[[wrappers.Request], history.Answer]) -> Route:
    """Arrays as safetensors with JSON metadata: NaN and infinity survive."""
    return lambda request: http_util.Respond(request, pack(*answer(request)), "application/octet-stream")


def _serve_file(path: Path, content_type: str) -> Route:
    return lambda request: http_util.Respond(request, path.read_bytes(), content_type)


def _serve_plotly(request: wrappers.Request) -> wrappers.Response:
    return http_util.Respond(request, plotly_script(), "text/javascript", content_encoding="gzip", expires=DAY)


def _with_json_errors(route: Route) -> Any:
    """A WSGI application that answers errors with a sentence, as JSON."""

    def answer(request: wrappers.Request) -> wrappers.Response:
        if request.method not in ("GET", "HEAD"):
            return _error(request, 405, "This address is read-only.")
        try:
            return route(request)
        except RequestError as error:
            return _error(request, error.status, str(error))
        except history.MissingError as error:
            return _error(request, 404, str(error))
        except errors.PublicError as error:
            return _error(request, error.http_code, str(error))
        except Exception as error:
            logger.exception("Input Hessian: no answer to %s", request.path)
            return _error(request, 500, f"TensorBoard could not answer: {type(error).__name__}. Its log has details.")

    return wrappers.Request.application(answer)


def _error(request: wrappers.Request, status: int, message: str) -> wrappers.Response:
    return http_util.Respond(request, {"error": message}, "application/json", code=status)
