"""A record's event for the "Input Hessian" tab, through the ``SummaryWriter`` of a logger."""

from __future__ import annotations

from typing import Any

from lightning_hessian.records.event_format import CONTENT, PLUGIN_NAME


def add_payload(writer: Any, tag: str, payload: bytes, logged_step: int) -> None:
    """Writes ``payload``, made by ``event_format.pack_summary``, as the tab's event.

    No public method of a ``SummaryWriter`` sets the class of a tensor's data, without which TensorBoard hides its
    tag; and an event file of our own in the same directory would lose data with ``--load_fast=false``.
    """
    writer._get_file_writer().add_summary(_in_protos_of(writer, _summary(tag, payload)), logged_step)


def _summary(tag: str, payload: bytes) -> Any:
    # Here: a run without TensorBoard loads none of it.
    from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
    from tensorboard.compat.proto.tensor_pb2 import TensorProto
    from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
    from tensorboard.compat.proto.types_pb2 import DT_STRING

    plugin = SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=CONTENT)
    metadata = SummaryMetadata(plugin_data=plugin, data_class=DATA_CLASS_TENSOR)
    tensor = TensorProto(dtype=DT_STRING, tensor_shape=TensorShapeProto(), string_val=[payload])
    return Summary(value=[Summary.Value(tag=tag, metadata=metadata, tensor=tensor)])


def _in_protos_of(writer: Any, summary: Any) -> Any:
    """The same summary in the writer's own protos: tensorboardX refuses those of TensorBoard."""
    if not any(c.__module__.startswith("tensorboardX") for c in type(writer).__mro__):
        return summary
    from tensorboardX.proto.summary_pb2 import Summary

    return Summary.FromString(summary.SerializeToString())
