"""Margin charts in TensorBoard's Custom scalars tab, beside those of the user.

TensorBoard shows only the last layout of a run. Ours therefore repeats what others have written, and is written again
when others have replaced it: before each measurement's pictures, and at the end.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning_hessian.records.color_scale import MAX_CLASSES
from lightning_hessian.records.metrics import LOGGED
from lightning_hessian.records.record import Record
from lightning_hessian.records.statistics import PERCENTILES
from lightning_hessian.writers.tags import metric_tag, spread_tag

PLUGIN_NAME = "custom_scalars"
TAG = "custom_scalars__config__"  # of every layout
LARGEST = 2**20  # bytes; larger events are pictures and the like, and are not read


def margin_charts(record: Record) -> Any:
    """One margin chart (mean, 10th to 90th percentile over samples) per metric and class, as a category of a layout."""
    from tensorboard.plugins.custom_scalar import layout_pb2

    charts = []
    for metric in reversed(LOGGED):  # TensorBoard shows a layout's charts last one first
        for class_id in reversed(record.class_ids[:MAX_CLASSES]):
            suffix = record.tag_suffix(class_id)
            lower, upper = (spread_tag(metric.name, suffix, percent) for percent in PERCENTILES)
            series = layout_pb2.MarginChartContent.Series(
                value=metric_tag(metric.name, suffix), lower=lower, upper=upper
            )
            content = layout_pb2.MarginChartContent(series=[series])
            charts.append(layout_pb2.Chart(title=f"{metric.title}, {suffix.replace('_', ' ')}", margin=content))
    title = "Input Hessian" if record.name is None else f"Input Hessian {record.name}"
    return layout_pb2.Category(title=f"{title}: mean and 10th to 90th percentile over samples", chart=charts)


class SharedLayout:
    """The layout of one ``SummaryWriter``: the categories of all monitors, beside those of others.

    Args:
        writer: through which it is written.
    """

    def __init__(self, writer: Any) -> None:
        self._ours: dict[str, Any] = {}
        self._read: dict[Path, int] = {}  # how much of each event file
        self._shown: Any = None  # the layout that was read or written last
        self._lock = threading.Lock()  # monitors of one Trainer have a thread each
        folder = getattr(writer, "log_dir", None)
        self._folder = Path(folder) if folder is not None and "://" not in str(folder) else None

    def update(self, category: Any | None) -> Any | None:
        """The layout to be written, all that was written before being in the files; None where nothing has changed.

        Args:
            category: of ours, to be added; None: as it is.
        """
        from tensorboard.plugins.custom_scalar import layout_pb2

        with self._lock:
            if category is not None:
                self._ours[category.title] = category
            self._read_files()
            found = [] if self._shown is None else list(self._shown.category)
            if all(ours in found for ours in self._ours.values()):
                return None
            others = [each for each in found if each.title not in self._ours]
            self._shown = layout_pb2.Layout(category=[*others, *self._ours.values()])
            return self._shown

    def _read_files(self) -> None:
        if self._folder is not None:
            for path in sorted(self._folder.glob("*tfevents*")):
                for event in self._new_layouts(path):  # in the order in which TensorBoard reads them
                    self._note(event)

    def _note(self, content: bytes) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.plugins.custom_scalar import layout_pb2

        for value in Event.FromString(content).summary.value:
            if value.tag == TAG:
                self._shown = layout_pb2.Layout.FromString(value.tensor.string_val[0])

    def _new_layouts(self, path: Path) -> list[bytes]:
        """The events with layouts that were added to a file since the last call."""
        found = []
        with path.open("rb") as file:
            size, position = path.stat().st_size, self._read.get(path, 0)
            while position + 12 <= size:
                file.seek(position)
                length = int.from_bytes(file.read(12)[:8], "little")  # then 4 bytes of checksum, and 4 after the event
                if position + length + 16 > size:
                    break
                if length <= LARGEST and TAG.encode() in (content := file.read(length)):
                    found.append(content)
                position += length + 16
            self._read[path] = position
        return found


_layouts: WeakKeyDictionary[Any, SharedLayout] = WeakKeyDictionary()


def layout_of(writer: Any) -> SharedLayout:
    """The layout of a writer, the same for all monitors."""
    return _layouts.setdefault(writer, SharedLayout(writer))
