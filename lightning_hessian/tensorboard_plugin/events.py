"""The measurements of a run as TensorBoard's data provider delivers them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from threading import Lock
from typing import Any

import grpc
from tensorboard.data import provider as tensorboard_provider

from lightning_hessian.records.answers.history import History, count, describe, hidden, history
from lightning_hessian.records.event_format import PLUGIN_NAME, Summary, check_event_format, read_summary
from lightning_hessian.records.payload import DamagedDataError
from lightning_hessian.tensorboard_plugin.request import RequestError

MAX_EVENTS = 1 << 14  # requested at first; halved where TensorBoard cannot deliver as many
CACHE_BYTES = 1 << 28


class Histories:
    """Reads histories from a data provider, and caches the last ones until they grow.

    Args:
        provider: of TensorBoard; either loader's.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._cache: OrderedDict[Any, tuple[Any, History]] = OrderedDict()
        self._descriptions: dict[Any, tuple[Any, dict[str, Any]]] = {}
        self._lock = Lock()

    def tags(self, ctx: Any, experiment: str) -> dict[str, list[str]]:
        """The tags of each run that has any."""
        return {run: sorted(tags) for run, tags in self._list(ctx, experiment).items() if tags}

    def describe(self, ctx: Any, experiment: str, run: str, tag: str) -> dict[str, Any]:
        """What the list of runs says about one tag, without reading it again as long as it does not grow.

        Raises:
            RequestError: as ``read``.
        """
        key, stamp = self._stamp(ctx, experiment, run, tag)
        known = self._descriptions.get(key)
        if known is None or known[0] != stamp:
            known = self._descriptions[key] = (stamp, describe(self.read(ctx, experiment, run, tag), tag))
        return known[1]

    def read(self, ctx: Any, experiment: str, run: str, tag: str) -> History:
        """The measurements of one tag.

        Raises:
            RequestError: there is no such run or tag, or nothing in it can be read.
        """
        key, stamp = self._stamp(ctx, experiment, run, tag)
        with self._lock:
            cached = self._cache.pop(key, None)
            if cached is None or cached[0] != stamp:
                cached = (stamp, self._read(ctx, experiment, run, tag))
            self._cache[key] = cached
            while len(self._cache) > 1 and sum(_nbytes(each) for _, each in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        return cached[1]

    def _list(self, ctx: Any, experiment: str) -> Any:
        return self._provider.list_tensors(ctx, experiment_id=experiment, plugin_name=PLUGIN_NAME)

    def _stamp(self, ctx: Any, experiment: str, run: str, tag: str) -> tuple[Any, Any]:
        """The key under which a history is cached, and what changes when it grows."""
        if run not in {r.run_name for r in self._provider.list_runs(ctx, experiment_id=experiment)}:
            raise RequestError(404, f"There is no run {run!r}.")
        listed = self._list(ctx, experiment).get(run, {}).get(tag)
        if listed is None:
            raise RequestError(404, f"The run {run!r} has no measurements under the tag {tag!r}.")
        if why_not := check_event_format(listed.plugin_content):
            raise RequestError(404, why_not)
        return (experiment, run, tag), (listed.max_step, listed.max_wall_time)

    def _read(self, ctx: Any, experiment: str, run: str, tag: str) -> History:
        data, left_out = self._deliver(ctx, experiment, run, tag)
        found = {id(datum): summary for datum in data if (summary := _summary(datum))}
        present = without_superseded(data)
        summaries = [found[id(datum)] for datum in present if id(datum) in found]
        num_damaged = len(present) - len(summaries)
        if not summaries:
            raise RequestError(404, f"None of the {num_damaged} measurements under {tag!r} of {run!r} can be read.")
        if num_damaged:
            left_out.append(f"{count(num_damaged, 'damaged measurement')}")
        return history(summaries, left_out + hidden(num_hidden(summaries, found.values())))

    def _deliver(self, ctx: Any, experiment: str, run: str, tag: str) -> tuple[Sequence[Any], list[str]]:
        """All events of a tag that TensorBoard can deliver at once, and what it cannot."""
        chosen = tensorboard_provider.RunTagFilter([run], [tag])
        where = {"experiment_id": experiment, "plugin_name": PLUGIN_NAME, "run_tag_filter": chosen}
        num_events = MAX_EVENTS
        left_out: list[str] = []
        while True:
            try:
                found = self._provider.read_tensors(ctx, downsample=num_events, **where)
                return found.get(run, {}).get(tag, []), left_out
            except grpc.RpcError as error:
                if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or num_events == 1:
                    raise
                num_events //= 2
                left_out = ["some steps, because TensorBoard cannot deliver all of them at once (256 MiB)"]


def without_superseded(data: Sequence[Any]) -> list[Any]:
    """The events in order of step, without those at or after a step to which a resumed run went back.

    TensorBoard's two loaders retain different ones of these, so they are dropped here, by wall time.
    """
    present: list[Any] = []
    for datum in sorted(data, key=lambda d: d.wall_time):
        while present and present[-1].step >= datum.step:
            present.pop()
        present.append(datum)
    return present


def num_hidden(shown: Iterable[Summary], found: Iterable[Summary]) -> int:
    """How many measurements share a logged step with one that is shown, after other numbers of optimizer steps.

    Before training and after the first step, for example: loggers call both step 0. What a resumed run measured again
    is not among them.
    """
    steps = {(summary.logged_step, summary.meta["step"]) for summary in shown}
    others = {(summary.logged_step, summary.meta["step"]) for summary in found} - steps
    return sum(logged_step in dict(steps) for logged_step, _ in others)


def _summary(datum: Any) -> Summary | None:
    """The measurement in what the data provider delivers, a string tensor; None where it is damaged."""
    payload = datum.numpy.item() if datum.numpy.size == 1 else None
    try:
        return read_summary(payload, datum.step, datum.wall_time) if isinstance(payload, bytes) else None
    except DamagedDataError:
        return None


def _nbytes(measured: History) -> int:
    return sum(summary.nbytes for summary in measured.summaries)
