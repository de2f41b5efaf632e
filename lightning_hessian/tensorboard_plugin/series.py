"""The measurements of a run as TensorBoard's data provider has them, and curves and spectra made of them."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import grpc
import numpy as np
from tensorboard.data import provider as tensorboard_provider

from lightning_hessian.records.event_format import LAYOUT_VERSION, METRICS, PLUGIN_NAME, extreme_errors
from lightning_hessian.records.histogram import BIN_EDGES
from lightning_hessian.records.record import Array
from lightning_hessian.tensorboard_plugin.refusal import DamagedFile, Refused
from lightning_hessian.tensorboard_plugin.safe_file import SafeFile, finite_json

MAX_POINTS = 1 << 14  # what is asked for at first; halved where TensorBoard cannot hand over as much
CACHE_BYTES = 1 << 28
SPECTRA = ("eigenvalues", "residuals", "converged", "histogram")
PER_STEP = ("when", "method", "autodiff_mode", "diagnosis", "network", "message", "reason")


@dataclass(frozen=True)
class Summary:
    """One measurement: what its event holds.

    Attributes:
        logged_step: the loggers' step.
        arrays: small ones, over N samples and K columns.
        meta: in words.
        written: wall time of the event.
    """

    logged_step: int
    arrays: Mapping[str, Array]
    meta: Mapping[str, Any]
    written: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """N and K."""
        num_samples, num_columns = self.arrays["lambda_max"].shape
        return num_samples, num_columns

    @property
    def nbytes(self) -> int:
        """About how much memory it takes."""
        return 10_000 + sum(array.nbytes for array in self.arrays.values())


@dataclass(frozen=True)
class Series:
    """The measurements of one tag that count, in order of step, at least one.

    Attributes:
        summaries: all of the same N and K as the last.
        left_out: what was left out and why, in words, or None.
    """

    summaries: Sequence[Summary]
    left_out: str | None

    def at(self, step: int) -> Summary:
        """The measurement at a logged step.

        Raises:
            Refused: there is none.
        """
        for summary in self.summaries:
            if summary.logged_step == step:
                return summary
        steps = f"{self.summaries[0].logged_step} to {self.summaries[-1].logged_step}"
        raise Refused(404, f"There is no measurement at step {step}; there are {len(self.summaries)}, at {steps}.")


class Summaries:
    """Reads series from a data provider and remembers the last ones, until they grow.

    Args:
        provider: of TensorBoard; either loader's.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._cache: OrderedDict[Any, tuple[Any, Series]] = OrderedDict()
        self._overviews: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self._lock = Lock()

    def tags(self, ctx: Any, experiment: str) -> dict[str, list[str]]:
        """The tags of each run that has any."""
        return {run: sorted(tags) for run, tags in self._listed(ctx, experiment).items() if tags}

    def overview(self, ctx: Any, experiment: str, run: str, tag: str) -> dict[str, Any]:
        """What the list of runs says of one tag, without reading it again as long as it does not grow.

        Raises:
            Refused: as ``read``.
        """
        key, stamp = self._stamp(ctx, experiment, run, tag)
        known = self._overviews.get(key)
        if known is None or known[0] != stamp:
            known = (stamp, overview(self.read(ctx, experiment, run, tag), tag))
            self._overviews[key] = known
        return known[1]

    def read(self, ctx: Any, experiment: str, run: str, tag: str) -> Series:
        """The measurements of one tag.

        Raises:
            Refused: there is no such run or tag, or nothing in it can be read.
        """
        key, stamp = self._stamp(ctx, experiment, run, tag)
        with self._lock:
            remembered = self._cache.pop(key, None)
            if remembered is None or remembered[0] != stamp:
                remembered = (stamp, self._read(ctx, experiment, run, tag))
            self._cache[key] = remembered
            self._forget()
        return remembered[1]

    def _listed(self, ctx: Any, experiment: str) -> Any:
        return self._provider.list_tensors(ctx, experiment_id=experiment, plugin_name=PLUGIN_NAME)

    def _stamp(self, ctx: Any, experiment: str, run: str, tag: str) -> tuple[Any, Any]:
        """Under what a series is remembered, and what changes when it grows."""
        if run not in {r.run_name for r in self._provider.list_runs(ctx, experiment_id=experiment)}:
            raise Refused(404, f"There is no run {run!r}.")
        told = self._listed(ctx, experiment).get(run, {}).get(tag)
        if told is None:
            raise Refused(404, f"The run {run!r} has no measurements under the tag {tag!r}.")
        _check_layout(told.plugin_content)
        return (experiment, run, tag), (told.max_step, told.max_wall_time)

    def _forget(self) -> None:
        """Forgets what was not asked for longest, where it takes too much memory."""
        while len(self._cache) > 1 and sum(_nbytes(s) for _, s in self._cache.values()) > CACHE_BYTES:
            self._cache.popitem(last=False)

    def _read(self, ctx: Any, experiment: str, run: str, tag: str) -> Series:
        points, notes = MAX_POINTS, []
        chosen = tensorboard_provider.RunTagFilter([run], [tag])
        where = {"experiment_id": experiment, "plugin_name": PLUGIN_NAME, "run_tag_filter": chosen}
        while True:
            try:
                found = self._provider.read_tensors(ctx, downsample=points, **where)
                break
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or points == 1:
                    raise
                points //= 2
                notes = ["Some steps: all of them are more than TensorBoard hands over at once (256 MiB)."]
        summaries, damaged = [], 0
        data = found.get(run, {}).get(tag, [])
        for datum in counting(data):
            try:
                summaries.append(replace(parse(datum.step, datum.numpy), written=datum.wall_time))
            except DamagedFile:
                damaged += 1
        if not summaries:
            raise Refused(404, f"None of the {damaged} measurements under {tag!r} of {run!r} can be read.")
        alike = [s for s in summaries if s.shape == summaries[-1].shape]
        if damaged:
            notes.append(f"{damaged} measurements that are damaged.")
        if hidden := num_hidden(data, summaries):
            notes.append(f"{hidden} measurements that a later one followed at the same logged step.")
        if len(alike) < len(summaries):
            notes.append(f"{len(summaries) - len(alike)} measurements of other samples or classes than the last.")
        return Series(alike, "Left out: " + " ".join(notes) if notes else None)


def counting(data: Sequence[Any]) -> list[Any]:
    """The data that count, in order of step: without those that a resumed run went back behind and wrote anew.

    TensorBoard's two loaders keep different ones of these, so it is done here, by the time of writing.
    """
    kept: list[Any] = []
    for datum in sorted(data, key=lambda d: d.wall_time):
        while kept and kept[-1].step >= datum.step:
            kept.pop()
        kept.append(datum)
    return kept


def num_hidden(data: Sequence[Any], summaries: Sequence[Summary]) -> int:
    """How many events are of fewer optimizer steps than the one that counts at their logged step, in one session.

    As before training and after the first step, which loggers both call step 0. What a resumed run wrote anew is not
    among them.
    """
    at = {summary.logged_step: summary for summary in summaries}
    hidden = 0
    for datum in data:
        last = at.get(datum.step)
        if last is None or datum.wall_time >= last.written:
            continue
        try:
            meta = parse(datum.step, datum.numpy).meta
        except DamagedFile:
            continue
        hidden += meta["step"] < last.meta["step"] and meta.get("session") == last.meta.get("session")
    return hidden


def parse(step: int, value: Array) -> Summary:
    """One measurement from what the data provider gives: a string tensor.

    Raises:
        DamagedFile: it is not a payload of ours.
    """
    payload = value.item() if value.size == 1 else None
    if not isinstance(payload, bytes):
        raise DamagedFile("it is not a string")
    file = SafeFile(io.BytesIO(payload), len(payload))
    if len(file.shape("lambda_max")) != 2:
        raise DamagedFile("lambda_max is not a table of samples and classes")
    meta, table = file.meta or {}, file.shape("lambda_max")
    if not all(type(meta.get(name)) is int and meta[name] >= 0 for name in ("step", "num_inputs")):
        raise DamagedFile("it does not say at which step it was made")
    for name in file:
        shape, known = file.shape(name), _known_shape(name, table)
        if known is not None and (shape[: len(known)] != known or len(shape) != len(known) + (name in SPECTRA)):
            raise DamagedFile(f"{name} has the shape {list(shape)}")
    if len({file.shape(name) for name in SPECTRA[:3] if name in file}) > 1:
        raise DamagedFile("eigenvalues and their residuals are not of one shape")
    return Summary(step, {name: file.read(name) for name in file}, meta)


def curves(series: Series) -> tuple[dict[str, Array], dict[str, Any]]:
    """Every metric over steps, samples and columns, and what was said at each step."""
    summaries = series.summaries
    arrays: dict[str, Array] = {
        "steps": np.array([s.logged_step for s in summaries], np.int64),
        "epochs": np.array([_count(s.meta.get("epoch")) for s in summaries], np.int64),
        "num_matvecs": np.array([_count(s.meta.get("num_matvecs")) for s in summaries], np.int64),
        "seconds": np.array([_number(s.meta.get("seconds")) for s in summaries], np.float32),
    }
    arrays |= {name: found for name in METRICS if (found := _stacked(summaries, name, np.float32, np.nan)) is not None}
    for name in ("labels", "predicted", "classes"):
        found = _stacked(summaries, name, np.int32, -1)
        if found is not None:
            arrays[name] = found
    if all({"eigenvalues", "residuals", "converged"} <= set(s.arrays) for s in summaries):
        ends = [extreme_errors(s.arrays) for s in summaries]
        arrays |= {name: np.stack([end[name] for end in ends]) for name in ends[0]}
    meta = {name: [s.meta.get(name) for s in summaries] for name in PER_STEP}
    return arrays, {**meta, "optimizer_steps": [s.meta["step"] for s in summaries], "left_out": series.left_out}


def spectra(series: Series, sample: int, column: int) -> dict[str, Array]:
    """The spectra of one problem over steps; shorter ones are filled with NaN."""
    width = max((s.arrays["eigenvalues"].shape[-1] for s in series.summaries if "eigenvalues" in s.arrays), default=0)
    found: dict[str, Array] = {"steps": np.array([s.logged_step for s in series.summaries], np.int64)}
    for name, length in (("eigenvalues", width), ("residuals", width), ("converged", width), ("histogram", 64)):
        found[name] = np.full((len(series.summaries), length), np.nan, np.float32)
        for row, summary in zip(found[name], series.summaries, strict=True):
            if name in summary.arrays:
                values = summary.arrays[name][sample, column][:length]
                row[: len(values)] = values
    return {**found, "bin_edges": BIN_EDGES.astype(np.float32)}


def overview(series: Series, tag: str) -> dict[str, Any]:
    """What the list of runs says of one tag."""
    last = series.summaries[-1]
    told = {name: last.meta.get(name) for name in ("name", "target", "class_ids", "class_names", "num_inputs", "shape")}
    return {
        "tag": tag,
        **told,
        "num_samples": last.shape[0],
        "steps": [s.logged_step for s in series.summaries],
        "epochs": [_count(s.meta.get("epoch")) for s in series.summaries],
        "written": [s.written for s in series.summaries],
        "left_out": series.left_out,
    }


def _check_layout(content: bytes) -> None:
    try:
        told = finite_json(content)
    except DamagedFile:
        told = None
    version = told.get("layout") if isinstance(told, dict) else None
    if version != LAYOUT_VERSION:
        raise Refused(
            404,
            f"These measurements have the layout {version!r}, and this version of lightning-hessian reads "
            f"{LAYOUT_VERSION}. Update the package where TensorBoard runs.",
        )


def _known_shape(name: str, table: tuple[int, ...]) -> tuple[int, ...] | None:
    """With which lengths the shape of an array must begin; None for arrays that are not read here."""
    if name in METRICS or name in SPECTRA or name == "classes":
        return table
    return table[:1] if name in ("labels", "predicted") else None


def _stacked(summaries: Sequence[Summary], name: str, dtype: Any, missing: float) -> Array | None:
    """An array of every step on top of each other, or None where no step has it."""
    known = next((s.arrays[name] for s in summaries if name in s.arrays), None)
    if known is None:
        return None
    empty = np.full(known.shape, missing, dtype)
    return np.stack([s.arrays.get(name, empty).astype(dtype, copy=False) for s in summaries])


def _nbytes(series: Series) -> int:
    return sum(summary.nbytes for summary in series.summaries)


def _count(value: object) -> int:
    return value if type(value) is int and abs(value) < 1 << 62 else -1


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and abs(value) < 1e30 else float("nan")
