"""What TensorBoard shows of a record besides scalars and text: histograms, pictures, margin charts and the tab."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lightning_hessian.records.color_scale import MAX_CLASSES
from lightning_hessian.records.event_format import CONTENT, PLUGIN_NAME
from lightning_hessian.records.histogram import Histogram, mean_histogram
from lightning_hessian.records.matrices import Array
from lightning_hessian.records.record import ClassId, Record
from lightning_hessian.render.composite import composite
from lightning_hessian.writers import layout
from lightning_hessian.writers.tags import histogram_tag, picture_tag


def histograms(record: Record) -> dict[str, Histogram]:
    """The spectrum of each class on a signed logarithmic axis, by tag; none where only the ends are known."""
    found = {histogram_tag(record.tag_suffix(c)): mean_histogram(record, k) for k, c in enumerate(_shown(record))}
    return {tag: histogram for tag, histogram in found.items() if histogram is not None}


def pictures(record: Record, scale: int = 1) -> dict[str, Array]:
    """The composite picture of each class ``[H, W, 3]``, by tag; none where the record holds no matrices.

    ``scale`` 1 is TensorBoard's own size.
    """
    if record.hessian is None or not len(record.hessian):
        return {}
    return {picture_tag(record.tag_suffix(c)): composite(record, c, scale=scale).to_array() for c in _shown(record)}


def _shown(record: Record) -> tuple[ClassId, ...]:
    """The classes that have pictures and histograms: the first ones."""
    return record.class_ids[:MAX_CLASSES]


def add_histograms(writer: Any, by_tag: Mapping[str, Histogram], logged_step: int) -> None:
    """Writes what ``histograms`` returned through a ``SummaryWriter``."""
    for tag, histogram in by_tag.items():
        writer.add_histogram_raw(tag, **asdict(histogram), global_step=logged_step)


def add_pictures(writer: Any, by_tag: Mapping[str, Array], logged_step: int) -> None:
    """Writes what ``pictures`` returned."""
    for tag, image in by_tag.items():
        writer.add_image(tag, image, logged_step, dataformats="HWC")


def add_text(writer: Any, tag: str, markdown: str, logged_step: int) -> None:
    """Writes text."""
    writer.add_text(tag, markdown, logged_step)


def add_layout(writer: Any, category: Any | None) -> None:
    """Adds our charts to the layout of Custom scalars, and puts back those that another layout has replaced."""
    flush = getattr(writer, "flush", None)
    if flush is not None:
        flush()  # so that every layout written so far is in a file
    shown = layout.layout_of(writer).update(category)
    if shown is not None:
        _add_string(writer, layout.TAG, shown.SerializeToString(), 0, layout.PLUGIN_NAME)


def add_payload(writer: Any, tag: str, payload: bytes, logged_step: int) -> None:
    """Writes ``payload``, made by ``event_format.pack_summary``, as the event that the Input Hessian tab reads."""
    _add_string(writer, tag, payload, logged_step, PLUGIN_NAME, CONTENT)


def _add_string(writer: Any, tag: str, text: bytes, logged_step: int, plugin_name: str, content: bytes = b"") -> None:
    """Writes a string tensor for a plugin of TensorBoard.

    No public method of a ``SummaryWriter`` sets the class of a tensor's data, without which TensorBoard hides its
    tag; and an event file of our own in the same directory would lose data with ``--load_fast=false``.
    """
    # Imported here, so that a run without TensorBoard loads none of it.
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name=plugin_name, content=content)
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[text])
    summary = Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])
    writer._get_file_writer().add_summary(_in_protos_of(writer, summary), logged_step)


def _in_protos_of(writer: Any, summary: Any) -> Any:
    """The same summary in the writer's own protos: tensorboardX rejects those of TensorBoard."""
    if not any(c.__module__.startswith("tensorboardX") for c in type(writer).__mro__):
        return summary
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary.FromString(summary.SerializeToString())
