"""What the tab reads is what was measured: packed, written by a real run, and read back; damage is an error."""

import json
import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import safetensors.numpy
import torch
from support.measuring import Measurer
from support.networks import mlp
from support.training import events, fit, small_monitor

from lightning_hessian import load_records
from lightning_hessian.curvature.options import Options
from lightning_hessian.records import event_format
from lightning_hessian.records.answers.history import uncertainty
from lightning_hessian.records.event_format import EVENT_FORMAT_VERSION, Summary, read_summary
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.records.payload import DamagedDataError, unpack
from lightning_hessian.training.samples import Samples
from lightning_hessian.writers.tensorboard import add_payload


def record_of(method="auto", activation=torch.nn.GELU, inputs=6, labels=True, **arguments):
    samples = Samples(torch.randn(3, inputs), torch.tensor([0, 1, 2]) if labels else None)
    monitor = Measurer([0, 2], "prob", "float64", Options(method, **arguments), heatmap_samples=1)
    return monitor.measure(mlp(activation, inputs=inputs), samples, step=7, logged_step=6, epoch=1)


def summary_of(record) -> Summary:
    """What the tab reads of a record's event."""
    return read_summary(event_format.pack_summary(record), record.logged_step)


def test_the_arrays_of_a_summary_are_the_records():
    record = record_of()
    summary = summary_of(record)
    arrays, meta = summary.arrays, summary.meta
    for metric in METRICS:
        np.testing.assert_allclose(arrays[metric.name], getattr(record, metric.name), rtol=1e-6)
        assert (arrays[metric.name].dtype, arrays[metric.name].shape) == (np.float32, (3, 2))
    np.testing.assert_allclose(arrays["eigenvalues"], record.eigenvalues, rtol=1e-6)
    np.testing.assert_array_equal(arrays["converged"], record.converged.astype(np.uint8))
    np.testing.assert_allclose(arrays["histogram"].sum(-1), 6, rtol=1e-6)
    assert [arrays[n].tolist() for n in ("labels", "predicted", "classes")] == [
        a.tolist() for a in (record.labels, record.predicted, record.classes)
    ]
    same = ("format", "step", "logged_step", "class_ids", "num_inputs", "shape", "measured_at")
    assert [meta[n] for n in same] == [2, 7, 6, [0, 2], 6, [6], record.measured_at]
    assert meta["in_file"] == {"matrices": [0], "eigenvectors": True, "why_no_matrix": None}
    assert (summary.shape, summary.class_ids) == ((3, 2), [0, 2])


def test_it_is_a_safetensors_payload_that_others_read():
    payload = event_format.pack_summary(record_of())
    arrays, _ = unpack(payload)
    theirs = safetensors.numpy.load(payload)
    assert set(theirs) == set(arrays)
    assert all(np.array_equal(theirs[n], arrays[n], equal_nan=True) for n in arrays)


def test_of_many_eigenvalues_the_largest_magnitudes_in_descending_order():
    record = record_of("dense", inputs=100)
    arrays = summary_of(record).arrays
    values = record.eigenvalues[1, 0]
    expected = values[np.sort(np.argsort(-abs(values), kind="stable")[:64])]
    np.testing.assert_allclose(arrays["eigenvalues"][1, 0], expected, rtol=1e-6)
    assert (np.diff(arrays["eigenvalues"]) <= 0).all()


def test_what_is_unknown_is_absent():
    record = replace(record_of("lanczos", inputs=60, labels=False, num_eigenvalues=2), hessian=None)
    arrays = summary_of(record).arrays
    assert not {"labels", "histogram"} & set(arrays)


def test_only_the_formed_matrix_gives_a_histogram_beside_the_ends():
    arrays = summary_of(record_of("lanczos", inputs=60, num_eigenvalues=2)).arrays
    np.testing.assert_allclose(arrays["histogram"][0].sum(-1), 60)
    assert np.isnan(arrays["histogram"][1:]).all()


def headed(header, data=b""):
    head = json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


META = {"__metadata__": {"lightning_hessian": '{"format": 2}'}}


OF_OLD = "|InvalidHeaderDeserialization"  # what safetensors 0.4.5 says instead


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "(?i)header ?too ?small"),
        (b"\xff" * 30, "(?i)header ?too ?large"),
        (headed({})[:-1], "(?i)header"),
        (headed([]), "not in the safetensors format"),
        (headed({"a": 1}), "not in the safetensors format"),
        (headed({"__metadata__": {"lightning_hessian": '{"format": 1}'}}), "Update"),
        (headed({"__metadata__": {"other": "{}"}}), "no metadata of lightning-hessian"),
        (
            headed({**META, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"),
            "not fully covered|IncompleteBuffer",
        ),
        (headed({**META, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "tensor"),
        (headed({**META, "a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}, b"1234"), "-1" + OF_OLD),
        (
            headed({**META, "a": {"dtype": "X", "shape": [], "data_offsets": [0, 4]}}, b"1234"),
            "unknown variant" + OF_OLD,
        ),
    ],
)
def test_a_damaged_payload_is_an_error(payload, message):
    with pytest.raises(DamagedDataError, match=message):
        read_summary(payload, 0)


def test_the_content_of_a_tag_is_its_version():
    assert json.loads(event_format.CONTENT) == {"format": EVENT_FORMAT_VERSION}
    assert event_format.check_event_format(event_format.CONTENT) is None
    for content in (b'{"format": 1}', b'{"layout": 2}', b"", b"2", b"[" * 100_000, b"\xff"):
        assert "Update the package" in event_format.check_event_format(content)


def test_a_run_writes_one_event_for_each_measurement(tmp_path):
    fit(tmp_path, small_monitor(keep_matrices=False), small_monitor(name="b"), max_epochs=1)
    seen = events(tmp_path)
    for name, tag in ((None, "input_hessian"), ("b", "input_hessian/b")):
        metadata = seen.SummaryMetadata(tag)
        assert (metadata.plugin_data.plugin_name, metadata.plugin_data.content) == (
            "input_hessian",
            event_format.CONTENT,
        )
        assert metadata.data_class == 2  # DATA_CLASS_TENSOR
        written = seen.Tensors(tag)
        records = load_records(tmp_path, name)
        assert [e.step for e in written] == [r.logged_step for r in records]
        arrays, meta = unpack(written[-1].tensor_proto.string_val[0])
        np.testing.assert_array_equal(arrays["trace"], records[-1].trace)
        assert (meta["step"], meta["name"], meta["measured_at"]) == (4, name, records[-1].measured_at)
        assert (tmp_path / event_format.FOLDER / (name or "") / event_format.file_name(4)).exists()
    in_file = unpack(seen.Tensors("input_hessian")[-1].tensor_proto.string_val[0])[1]["in_file"]
    assert in_file == {
        "matrices": [],
        "eigenvectors": True,
        "why_no_matrix": "Whole matrices are not stored: keep_matrices=False.",
    }


def test_tags_and_files_of_stages_and_names():
    assert [event_format.tag(None), event_format.tag("a"), event_format.tag("a", "test")] == [
        "input_hessian", "input_hessian/a", "input_hessian_test/a"
    ]  # fmt: skip
    assert event_format.file_name(3, "validate") == "step_000000003_validate.safetensors"


def test_a_writer_of_tensorboardx_gets_its_own_protos(monkeypatch):
    """Stands in for tensorboardX, whose event refuses the summaries of TensorBoard."""

    class Summary:
        @staticmethod
        def FromString(serialised):
            return ("own", serialised)

    theirs = ModuleType("tensorboardX.proto.summary_pb2")
    theirs.Summary = Summary
    for name in ("tensorboardX", "tensorboardX.proto"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.summary_pb2", theirs)
    seen = []

    class Writer:
        def _get_file_writer(self):
            return self

        def add_summary(self, summary, step):
            seen.append((summary, step))

    Writer.__module__ = "tensorboardX.writer"
    add_payload(Writer(), "input_hessian", b"payload", 3)
    ((kind, serialised), step) = seen[0]
    assert (kind, step) == ("own", 3)
    assert b"payload" in serialised


def test_the_event_of_a_large_run_is_small():
    """32 samples of 10 classes at D = 784: what grows with D is not in the event."""
    record = record_of()
    shape, listed = (32, 10), 784
    grown = {"metrics": {metric.name: np.zeros(shape) for metric in METRICS}}
    grown |= {n: np.zeros((*shape, listed)) for n in ("eigenvalues", "residuals")}
    grown |= {"converged": np.ones((*shape, listed), bool), "classes": np.zeros(shape, int)}
    grown |= {"finite_difference_error": np.zeros(shape), "valid": np.ones(shape, bool)}
    grown |= {"density_nodes": np.zeros((*shape, 1, listed)), "density_weights": np.full((*shape, 1, listed), 1 / 784)}
    grown |= {"x": np.zeros((32, 784)), "gradient": np.zeros((*shape, 784)), "hessian": None}
    payload = event_format.pack_summary(replace(record, labels=None, predicted=np.zeros(32, int), **grown))
    assert len(payload) < 300_000


def test_a_histogram_says_whether_it_is_estimated():
    options = {"inputs": 60, "num_eigenvalues": 2}
    estimated = record_of("lanczos", density_vectors=3, **options)
    ends = replace(record_of("lanczos", **options), hessian=None)
    for record, words in (
        (record_of("dense"), "exact"),
        (record_of("lanczos", **options), "exact"),  # from the formed matrix
        (estimated, "estimated from 3 random starting vectors"),
        (ends, None),
    ):
        assert summary_of(record).meta["histogram"] == words


def test_both_ends_are_listed_however_many_are_larger():
    """Of 100 negative eigenvalues the largest one is of smallest magnitude; it has not converged."""
    record = record_of()
    shape = (3, 2, 100)
    values = np.broadcast_to(-np.arange(1.0, 101), shape)
    open_end = np.broadcast_to(np.arange(100) > 0, shape)
    residuals = np.broadcast_to(np.where(np.arange(100) == 0, 0.5, 0), shape)
    ends = {"lambda_max": np.full((3, 2), -1.0), "lambda_min": np.full((3, 2), -100.0)}
    record = replace(record, eigenvalues=values, converged=open_end, residuals=residuals).with_metrics(**ends)
    arrays = summary_of(record).arrays
    assert arrays["eigenvalues"][0, 0].tolist() == [-1, *range(-38, -101, -1)]
    found = uncertainty(arrays)
    assert (found["lambda_max_error"] == 0.5).all()
    assert not found["lambda_max_converged"].any()
    assert found["lambda_min_converged"].all()
