"""A bad request gets an error that explains it, and nothing outside of a run's files is read."""

import dataclasses
import itertools
import json
import os
import threading

import numpy as np
import pytest
from safetensors.numpy import save
from support.make_run import Tab, rewrite, train, unpack, write_run

from lightning_hessian.records.answers import matrix
from lightning_hessian.records.event_format import pack_summary
from lightning_hessian.records.files import save_record
from lightning_hessian.tensorboard_plugin import files

NO_MATRIX = {"hessian_triangle": None}
RUN = {"run": "run", "tag": "input_hessian"}
WHICH = {**RUN, "step": 9, "sample": 0, "class_id": 3}
META = '{"format": 2, "step": 1, "num_inputs": 9, "class_ids": [1, 3]}'
OURS = {"lightning_hessian": META}
FROM_FILES = ("/input", "/maps", "/matrix", "/row")


@pytest.fixture(scope="module")
def records():
    return train()


@pytest.fixture
def logdir(records, tmp_path):
    write_run(tmp_path / "logs" / "run", records)
    return tmp_path / "logs"


@pytest.fixture
def path(logdir):
    return logdir / "run" / "input_hessian" / "step_000000010.safetensors"


@pytest.mark.parametrize(
    "run", ["..", "../run", "run/..", "run/../run", "%2e%2e", "..%2frun", "/", "/etc", "", "other"]
)
@pytest.mark.parametrize("route", ["/series", "/maps"])
def test_an_unknown_run(logdir, records, run, route):
    save_record(records[1], logdir.parent)  # what `..` would find
    assert Tab(logdir).error(404, route, **{**WHICH, "run": run}).startswith("There is no run")


@pytest.mark.parametrize("tag", ["", "other", "input_hessian/..", "input_hessian/other", "../input_hessian"])
def test_an_unknown_tag(logdir, tag):
    assert "no measurements under the tag" in Tab(logdir).error(404, "/series", run="run", tag=tag)


@pytest.mark.parametrize("name", ["..", "../..", "../../other/input_hessian", ".hidden", "a/b", "a\x00b", "/etc"])
def test_a_tag_in_the_event_file_that_leads_elsewhere(logdir, records, name):
    write_run(logdir / "other", records)
    write_run(logdir / "bad", records, tag=f"input_hessian/{name}", files=False)
    tab = Tab(logdir)
    message = tab.error(404, "/maps", **{**WHICH, "run": "bad", "tag": f"input_hessian/{name}"})
    assert "not the tag of a monitor" in message
    assert not tab.get("/runs").json["runs"][0]["tags"][0]["files"]


@pytest.mark.parametrize("step", [1, 10, 8, 999_999_999_999])
def test_an_unknown_step(logdir, step):
    tab = Tab(logdir)
    for route in FROM_FILES:
        assert f"no measurement at step {step}" in tab.error(404, route, **{**WHICH, "step": step})


@pytest.mark.parametrize("value", ["-1", "2", "1000000000000000", "9" * 400, "0.0", "1e0", "0x1", "", " 0", "٠", "nan"])
@pytest.mark.parametrize("name", ["sample", "class_id"])
def test_bad_indices(logdir, name, value):
    tab = Tab(logdir)
    for route in ("/spectra", *FROM_FILES) if name == "sample" else ("/spectra", *FROM_FILES[1:]):
        assert f"{name}=" in tab.error(400, route, **{**WHICH, "index": 0, name: value})


@pytest.mark.parametrize(
    ("route", "name", "values"),
    [
        ("/maps", "step", ["-1", "x", "1.0", "../9", "9" * 400]),
        ("/row", "index", ["-1", "9", "x", "9" * 400]),
        ("/matrix", "size", ["0", "-1", "2049", "x"]),
    ],
)
def test_bad_numbers(logdir, route, name, values):
    tab = Tab(logdir)
    for value in values:
        assert "must be a whole number" in tab.error(400, route, **{**WHICH, name: value})


@pytest.mark.parametrize(
    ("route", "name"), [("/series", "run"), ("/series", "tag"), ("/row", "index"), ("/row", "step")]
)
def test_a_missing_parameter_is_named(logdir, route, name):
    request = {k: v for k, v in WHICH.items() if k != name}
    assert Tab(logdir).error(400, route, **request) == f"The request lacks the parameter {name}."


def test_only_for_reading(logdir):
    from werkzeug.test import Client

    assert Client(Tab(logdir).plugin.get_plugin_apps()["/runs"]).post("/").status_code == 405


def test_a_link_out_of_the_run(logdir, path, tmp_path):
    path.rename(tmp_path / "secret.safetensors")
    path.symlink_to(tmp_path / "secret.safetensors")
    assert "not beside the events" in Tab(logdir).error(404, "/maps", **WHICH)


def test_a_link_of_the_folder_out_of_the_run(logdir, path, tmp_path):
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    tab = Tab(logdir)
    assert "symbolic link" in tab.error(404, "/maps", **WHICH)
    assert "symbolic link" in tab.get("/runs").json["runs"][0]["tags"][0]["why_no_files"]


def test_a_link_of_the_run_out_of_the_logdir(logdir, tmp_path):
    (logdir / "run").rename(tmp_path / "elsewhere")
    (logdir / "run").symlink_to(tmp_path / "elsewhere")
    tab = Tab(logdir)
    assert "symbolic link" in tab.error(404, "/maps", **WHICH)
    assert tab.get("/series", **RUN).status_code == 200  # TensorBoard itself follows it to the events


def test_a_logdir_that_is_a_link(logdir, tmp_path):
    (tmp_path / "link").symlink_to(logdir)
    assert Tab(tmp_path / "link").get("/maps", **WHICH).status_code == 200


def test_a_pipe_in_place_of_the_file(logdir, path):
    path.unlink()
    os.mkfifo(path)
    assert "not beside the events" in Tab(logdir).error(404, "/maps", **WHICH)


def test_a_folder_in_place_of_the_file(logdir, path):
    path.unlink()
    path.mkdir()
    assert "not beside the events" in Tab(logdir).error(404, "/maps", **WHICH)


def test_a_file_that_is_truncated_while_it_is_read(logdir, path, monkeypatch):
    def check_file(*_):
        os.truncate(path, 100)

    monkeypatch.setattr("lightning_hessian.tensorboard_plugin.files.check_file", check_file)
    assert "is incomplete: the file has become shorter" in Tab(logdir).error(404, "/maps", **WHICH)


def test_a_file_that_is_overwritten_while_it_is_read(logdir, path, records, monkeypatch):
    """Its numbers would be those of another measurement, of the same shapes."""
    content = path.read_bytes()
    other = save_record(dataclasses.replace(records[2], step=10), logdir.parent).read_bytes()
    assert len(other) == len(content)

    def check_file(*_):
        path.write_bytes(other)
        os.utime(path, ns=(0, next(times)))  # of the next write, however coarse the clock of the file system is

    times = iter(range(10))
    monkeypatch.setattr("lightning_hessian.tensorboard_plugin.files.check_file", check_file)
    tab = Tab(logdir)
    for route in FROM_FILES:
        path.write_bytes(content)
        assert "is damaged: it was changed while it was read; try again" in tab.error(404, route, **WHICH, index=0)


def test_a_file_that_is_replaced_while_it_is_read(logdir, path, records, monkeypatch):
    """What was opened is read to its end; the next request meets the other file."""

    def check_file(file, summary):
        check(file, summary)
        other.replace(path)

    other = save_record(dataclasses.replace(records[2], step=10), logdir.parent)
    check = files.check_file
    monkeypatch.setattr(files, "check_file", check_file)
    tab = Tab(logdir)
    np.testing.assert_array_equal(tab.arrays("/maps", **WHICH)[0]["gradient"], records[1].gradient[0, 1])
    assert "belongs to a different measurement than the event" in tab.error(404, "/maps", **WHICH)


def test_a_file_that_changes_all_the_time(logdir, path, records):
    """Every answer is right, or a sentence."""
    other = save_record(dataclasses.replace(records[2], step=10), logdir.parent).read_bytes()
    content, stop = path.read_bytes(), threading.Event()

    def change():
        contents = itertools.cycle([content, other, content[:700], b"", content[:-4]])
        while not stop.is_set():
            path.write_bytes(next(contents))

    tab, expected, answers = Tab(logdir), records[1].gradient[0, 1], []
    thread = threading.Thread(target=change)
    thread.start()
    try:
        answers = [tab.get("/maps", **WHICH) for _ in range(200)]
    finally:
        stop.set()
        thread.join()
    for answer in answers:
        if answer.status_code == 200:
            np.testing.assert_array_equal(unpack(answer.data)[0]["gradient"], expected)
        else:
            assert answer.status_code == 404
            assert answer.json["error"].startswith("The file of step 10")


def test_a_file_that_may_not_be_read(logdir, path, monkeypatch):
    def forbidden(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lightning_hessian.records.payload.open", forbidden, raising=False)
    assert "cannot be read: Permission denied" in Tab(logdir).error(404, "/maps", **WHICH)


def test_a_pickle_in_place_of_the_file(logdir, path, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path.write_bytes(pickle.dumps(Bomb()))
    assert "damaged" in Tab(logdir).error(404, "/maps", **WHICH)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(logdir, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    tab = Tab(logdir)
    for route in FROM_FILES:
        assert "step 10 is damaged" in tab.error(404, route, **WHICH, index=0)


def test_a_header_of_2_to_the_60_bytes(logdir, path):
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "header too large" in Tab(logdir).error(404, "/maps", **WHICH)


def test_offsets_beyond_the_file_and_overlaps(logdir, path):
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    for change in (
        [len(data), 2 * len(data)],
        [0, header["hessian_triangle"]["data_offsets"][1] - 4],
        [2**50, 2**50 + 8],
    ):
        text = json.dumps(
            {**header, "hessian_triangle": {**header["hessian_triangle"], "data_offsets": change}}
        ).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        assert "damaged" in Tab(logdir).error(404, "/matrix", **WHICH)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("hessian_triangle", np.zeros((1, 1, 45))),
        ("hessian_triangle", np.array(1.0)),
        ("hessian_triangle", np.zeros((1, 2, 44))),
        ("gradient", np.zeros((2, 2, 8))),
        ("gradient", np.zeros(9)),
        ("gradient", None),
    ],
)
def test_arrays_that_do_not_fit_each_other(logdir, name, array):
    rewrite(logdir / "run", 10, arrays={**NO_MATRIX, name: array})
    assert "damaged" in Tab(logdir).error(404, "/matrix", **WHICH)


def test_a_file_of_other_samples(logdir):
    rewrite(logdir / "run", 10, arrays={"gradient": np.zeros((3, 2, 9))})
    assert "belongs to a different measurement than the event" in Tab(logdir).error(404, "/maps", **WHICH)


def test_a_file_of_another_measurement(records, tmp_path):
    """The event of a resumed run was written, its file was not yet: the older file has the same step."""
    again = dataclasses.replace(records[1], measured_at=records[1].measured_at + 1)
    write_run(tmp_path / "run", [again])
    save_record(records[1], tmp_path / "run")
    for route in FROM_FILES:
        message = Tab(tmp_path).error(404, route, **WHICH, index=0)
        assert message.startswith("The file of step 10 belongs to a different measurement than the event")
    save_record(again, tmp_path / "run")
    assert Tab(tmp_path).get("/maps", **WHICH).status_code == 200


@pytest.mark.parametrize("index", [[0, 1, 2, 9], [-1, 0, 1, 2], [0, 1]])
def test_eigenvectors_that_do_not_fit(logdir, index):
    wrong = np.broadcast_to(np.array(index), (2, 2, len(index)))
    rewrite(logdir / "run", 10, arrays={**NO_MATRIX, "vector_index": wrong})
    tab = Tab(logdir)
    assert "do not fit" in tab.error(404, "/maps", **WHICH)
    assert "do not fit" in tab.error(404, "/matrix", **WHICH)


def test_part_of_the_eigenvectors_is_not_the_matrix(logdir):
    rewrite(logdir / "run", 10, arrays=NO_MATRIX)
    assert "stored for no sample at this step" in Tab(logdir).error(404, "/matrix", **WHICH)


def test_a_matrix_too_large_to_be_drawn_still_has_rows(logdir, monkeypatch):
    monkeypatch.setattr(matrix, "MAX_DRAWN_INPUTS", 8)
    tab = Tab(logdir)
    assert "too large to be drawn" in tab.error(404, "/matrix", **WHICH)
    assert tab.get("/row", **WHICH, index=0).status_code == 200


def test_words_that_json_does_not_know(records, tmp_path):
    arrays, meta = unpack(pack_summary(records[1]))
    payload = save(arrays, {"lightning_hessian": json.dumps({**meta, "seconds": float("nan"), "list": [float("inf")]})})
    write_run(tmp_path / "run", records[1:2], payload=payload)
    tab = Tab(tmp_path)
    for route in ("/series", "/spectra", "/maps"):
        assert b"NaN" not in tab.get(route, **WHICH).data
    assert np.isnan(tab.arrays("/series", **RUN)[0]["seconds"]).all()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00" * 8,
        (2**60).to_bytes(8, "little") + b"{}",
        save({"lambda_max": np.zeros((2, 2))}, {"lightning_hessian": META.replace('"format": 2', '"format": 1')}),
        save({"lambda_max": np.zeros((2, 2))}, {"lightning_hessian": META.replace("[1, 3]", "[1]")}),
        save({"lambda_max": np.zeros((2, 2))}, {"lightning_hessian": META.replace("[1, 3]", "[1, {}]")}),
        save({"lambda_max": np.zeros(3)}, OURS),
        save({"lambda_max": np.zeros((2, 2))}, {"lightning_hessian": META.replace('"step": 1', '"step": -1')}),
        save({"lambda_max": np.zeros((2, 2))}, {"lightning_hessian": META.replace('"step": 1', '"step": "../x"')}),
        save(
            {"lambda_max": np.zeros((2, 2)), "trace": np.zeros(2)},
            OURS,
        ),
        save(
            {"lambda_max": np.zeros((2, 2)), "eigenvalues": np.zeros((2, 2, 3)), "residuals": np.zeros((2, 2, 2))},
            OURS,
        ),
    ],
)
def test_a_damaged_event(records, tmp_path, payload):
    write_run(tmp_path / "run", records[:1])
    write_run(tmp_path / "run", records[1:2], payload=payload, start=1_800_000_000.0)
    write_run(tmp_path / "only", records[:1], payload=payload)
    tab = Tab(tmp_path)
    _, meta = tab.arrays("/series", **RUN)
    assert meta["left_out"] == "Left out: 1 damaged measurement."
    assert "None of the 1 measurements" in tab.error(404, "/series", run="only", tag="input_hessian")
    only = tab.get("/runs").json["runs"][0]["tags"][0]
    assert "None of the 1 measurements" in only["error"]


def test_an_event_of_another_format(records, tmp_path):
    write_run(tmp_path / "run", records, version=1)
    assert "Update the package" in Tab(tmp_path).error(404, "/series", **RUN)


def test_a_failure_is_reported_and_logged(logdir, monkeypatch, caplog):
    tab = Tab(logdir)
    monkeypatch.setattr(tab.plugin._files, "open", None)
    assert "TypeError" in tab.error(500, "/maps", **WHICH)
    assert "no answer to" in caplog.text
