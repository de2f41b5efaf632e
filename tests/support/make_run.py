"""Runs for the tests of the tab: real measurements of a network that is being trained, in a real event file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load
from tensorboard.backend.event_processing.data_ingester import LocalDataIngester
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins import base_plugin
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch import nn
from werkzeug.test import Client

from lightning_hessian import Record
from lightning_hessian.curvature.options import Options
from lightning_hessian.records.event_format import pack_summary
from lightning_hessian.records.files import save_record
from lightning_hessian.records.payload import open_arrays, pack
from lightning_hessian.tensorboard_plugin.loader import InputHessianLoader
from lightning_hessian.training.samples import Samples
from support.measuring import Measurer

START = 1_700_000_000.0  # wall time of the first event


def train(
    activation: type[nn.Module] = nn.GELU, target: str = "prob", steps: int = 3, size: int = 3, num_samples: int = 2
) -> list[Record]:
    """Measurements of samples of ``size × size`` pixels before, during and after a training of a few steps."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Flatten(), nn.Linear(size * size, 8), activation(), nn.Linear(8, 4))
    x, labels = torch.rand(16, 1, size, size), torch.arange(16) % 4
    monitor = Measurer([1, 3], target, "float32", Options(num_eigenvalues=4), heatmap_samples=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    records = []
    for step in range(steps):
        samples = Samples(x[:num_samples], labels[:num_samples])
        records.append(
            monitor.measure(net.eval(), samples, step=10 * step, logged_step=max(10 * step - 1, 0), epoch=step)
        )
        optimizer.zero_grad()
        nn.functional.cross_entropy(net.train()(x), labels).backward()
        optimizer.step()
    return records


def write_run(
    folder: Path,
    records: list[Record],
    *,
    tag: str = "input_hessian",
    files: bool = True,
    payload: bytes | None = None,
    version: int = 2,
    start: float = START,
) -> Path:
    """Writes the events of ``records``, one a second, and their files beside them."""
    writer = EventFileWriter(str(folder), filename_suffix=f".{start}")
    for second, record in enumerate(records):
        content = pack_summary(record) if payload is None else payload
        value = Summary.Value(tag=tag, tensor=TensorProto(dtype=DT_STRING, string_val=[content]))
        plugin_data = SummaryMetadata.PluginData(plugin_name="input_hessian", content=b'{"format": %d}' % version)
        value.metadata.CopyFrom(SummaryMetadata(plugin_data=plugin_data, data_class=DATA_CLASS_TENSOR))
        writer.add_event(
            Event(wall_time=start + second, step=record.logged_step, summary=Summary(value=[value])),
        )
        if files:
            save_record(record, folder)
    writer.close()
    return folder


def rewrite(folder: Path, step: int, *, arrays: dict[str, np.ndarray | None]) -> Path:
    """Replaces arrays of a saved file, or removes them."""
    path = folder / "input_hessian" / f"step_{step:09d}.safetensors"
    with open_arrays(path) as file:
        found, meta = {name: file.read(name) for name in file}, file.meta
    path.write_bytes(pack({name: a for name, a in {**found, **arrays}.items() if a is not None}, meta))
    return path


class Tab:
    """The plugin on the data provider that TensorBoard's own Python loader makes, without a server."""

    def __init__(self, logdir: Path | None, **flags: object) -> None:
        given = {
            "logdir": "" if logdir is None else str(logdir),
            "logdir_spec": "",
            "samples_per_plugin": {},
            "purge_orphaned_data": True,
            "max_reload_threads": 1,
            "reload_multifile": True,
            "reload_multifile_inactive_secs": -1,
            "detect_file_replacement": False,
            "reload_interval": 0,
            "reload_task": "blocking",
            **flags,
        }
        self.flags = argparse.Namespace(**given)
        loader = InputHessianLoader()
        loader.fix_flags(self.flags)
        self.ingester = LocalDataIngester(self.flags)
        context = base_plugin.TBContext(
            data_provider=self.ingester.data_provider, flags=self.flags, logdir=self.flags.logdir
        )
        self.plugin = loader.load(context)
        self.reload()

    def reload(self) -> None:
        self.ingester.start()

    def get(self, route: str, **arguments: object):
        """The answer of a route."""
        return Client(self.plugin.get_plugin_apps()[route]).get(
            "/", query_string={k: str(v) for k, v in arguments.items()}
        )

    def arrays(self, route: str, **arguments: object) -> tuple[dict[str, np.ndarray], dict]:
        """The arrays and the metadata of a binary answer."""
        answer = self.get(route, **arguments)
        assert answer.status_code == 200, answer.text
        return unpack(answer.data)

    def error(self, status: int, route: str, **arguments: object) -> str:
        """The sentence of an answer with the error ``status``."""
        answer = self.get(route, **arguments)
        assert answer.status_code == status, answer.data[:200]
        return answer.json["error"]


def unpack(content: bytes) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and metadata, by the safetensors library itself."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return load(content), json.loads(header["__metadata__"]["lightning_hessian"])


def later(records: list[Record], *, step: int) -> list[Record]:
    """The same measurements at other steps."""
    shift = step - records[0].step
    return [dataclasses.replace(r, step=r.step + shift, logged_step=r.logged_step + shift) for r in records]
