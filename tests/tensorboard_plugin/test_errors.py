"""What must not be answered is refused in words, and nothing outside of a run's files is read."""

import dataclasses
import json
import os

import numpy as np
import pytest
from safetensors.numpy import save
from support.make_run import Tab, rewrite, train, unpack, write_run

from lightning_hessian.records.event_format import pack_summary
from lightning_hessian.records.files import Session, save_record
from lightning_hessian.tensorboard_plugin import plugin

NO_MATRIX = {"hessian": None, "hessian_triangle": None}
RUN = {"run": "run", "tag": "input_hessian"}
PROBLEM = {**RUN, "step": 9, "sample": 0, "column": 1}
FROM_FILES = ("/problem", "/matrix", "/row")


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
@pytest.mark.parametrize("route", ["/series", "/problem"])
def test_an_unknown_run(logdir, records, run, route):
    save_record(records[1], logdir.parent)  # what `..` would find
    assert Tab(logdir).refused(404, route, **{**PROBLEM, "run": run}).startswith("There is no run")


@pytest.mark.parametrize("tag", ["", "other", "input_hessian/..", "input_hessian/other", "../input_hessian"])
def test_an_unknown_tag(logdir, tag):
    assert "no measurements under the tag" in Tab(logdir).refused(404, "/series", run="run", tag=tag)


@pytest.mark.parametrize("name", ["..", "../..", "../../other/input_hessian", ".hidden", "a/b", "a\x00b", "/etc"])
def test_a_tag_in_the_event_file_that_leads_elsewhere(logdir, records, name):
    write_run(logdir / "other", records)
    write_run(logdir / "bad", records, tag=f"input_hessian/{name}", files=False)
    tab = Tab(logdir)
    told = tab.refused(404, "/problem", **{**PROBLEM, "run": "bad", "tag": f"input_hessian/{name}"})
    assert "not the tag of a monitor" in told
    assert not tab.get("/runs").json["runs"][0]["tags"][0]["files"]


@pytest.mark.parametrize("step", [1, 10, 8, 999_999_999_999])
def test_an_unknown_step(logdir, step):
    tab = Tab(logdir)
    for route in ("/summary", *FROM_FILES):
        assert f"no measurement at step {step}" in tab.refused(404, route, **{**PROBLEM, "step": step})


@pytest.mark.parametrize("value", ["-1", "2", "1000000000000000", "9" * 400, "0.0", "1e0", "0x1", "", " 0", "٠", "nan"])
@pytest.mark.parametrize("name", ["sample", "column"])
def test_bad_indices(logdir, name, value):
    tab = Tab(logdir)
    for route in ("/spectra", *FROM_FILES):
        assert f"{name}=" in tab.refused(400, route, **{**PROBLEM, "index": 0, name: value})


@pytest.mark.parametrize(
    ("route", "name", "values"),
    [
        ("/summary", "step", ["-1", "x", "1.0", "../9", "9" * 400]),
        ("/row", "index", ["-1", "9", "x", "9" * 400]),
        ("/matrix", "size", ["0", "-1", "2049", "x"]),
    ],
)
def test_bad_numbers(logdir, route, name, values):
    tab = Tab(logdir)
    for value in values:
        assert "must be a whole number" in tab.refused(400, route, **{**PROBLEM, name: value})


@pytest.mark.parametrize(
    ("route", "name"), [("/series", "run"), ("/series", "tag"), ("/row", "index"), ("/row", "step")]
)
def test_what_is_missing_is_told(logdir, route, name):
    question = {k: v for k, v in PROBLEM.items() if k != name}
    assert Tab(logdir).refused(400, route, **question) == f"The request does not say which {name}."


def test_only_for_reading(logdir):
    from werkzeug.test import Client

    assert Client(Tab(logdir).plugin.get_plugin_apps()["/runs"]).post("/").status_code == 405


def test_a_link_out_of_the_run(logdir, path, tmp_path):
    path.rename(tmp_path / "secret.safetensors")
    path.symlink_to(tmp_path / "secret.safetensors")
    assert "not beside the events" in Tab(logdir).refused(404, "/problem", **PROBLEM)


def test_a_link_of_the_folder_out_of_the_run(logdir, path, tmp_path):
    path.parent.rename(tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    tab = Tab(logdir)
    assert "symbolic link" in tab.refused(404, "/problem", **PROBLEM)
    assert "symbolic link" in tab.get("/runs").json["runs"][0]["tags"][0]["why_no_files"]


def test_a_link_of_the_run_out_of_the_logdir(logdir, tmp_path):
    (logdir / "run").rename(tmp_path / "elsewhere")
    (logdir / "run").symlink_to(tmp_path / "elsewhere")
    tab = Tab(logdir)
    assert "symbolic link" in tab.refused(404, "/problem", **PROBLEM)
    assert tab.get("/series", **RUN).status_code == 200  # TensorBoard itself follows it to the events


def test_a_logdir_that_is_a_link(logdir, tmp_path):
    (tmp_path / "link").symlink_to(logdir)
    assert Tab(tmp_path / "link").get("/problem", **PROBLEM).status_code == 200


def test_a_pipe_in_place_of_the_file(logdir, path):
    path.unlink()
    os.mkfifo(path)
    assert "not beside the events" in Tab(logdir).refused(404, "/problem", **PROBLEM)


def test_a_folder_in_place_of_the_file(logdir, path):
    path.unlink()
    path.mkdir()
    assert "not beside the events" in Tab(logdir).refused(404, "/problem", **PROBLEM)


def test_a_file_that_may_not_be_read(logdir, path, monkeypatch):
    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", forbidden)
    assert "cannot be read: Permission denied" in Tab(logdir).refused(404, "/problem", **PROBLEM)


def test_a_pickle_in_place_of_the_file(logdir, path, tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    path.write_bytes(pickle.dumps(Bomb()))
    assert "damaged" in Tab(logdir).refused(404, "/problem", **PROBLEM)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_file(logdir, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    tab = Tab(logdir)
    for route in FROM_FILES:
        assert "step 10 is damaged" in tab.refused(404, route, **PROBLEM, index=0)


def test_a_header_of_2_to_the_60_bytes(logdir, path):
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])
    assert "header would have" in Tab(logdir).refused(404, "/problem", **PROBLEM)


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
        assert "damaged" in Tab(logdir).refused(404, "/matrix", **PROBLEM)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("hessian", np.zeros((1, 2, 3, 3))),
        ("hessian", np.zeros((1, 1, 9, 9))),
        ("hessian", np.array(1.0)),
        ("hessian_triangle", np.zeros((1, 2, 44))),
        ("hessian_triangle", np.zeros((1, 2, 45), np.float16)),  # without a scale
        ("gradient", np.zeros((2, 2, 8))),
        ("gradient", np.zeros(9)),
        ("gradient", None),
    ],
)
def test_arrays_that_do_not_fit_each_other(logdir, name, array):
    rewrite(logdir / "run", 10, arrays={**NO_MATRIX, name: array})
    assert "damaged" in Tab(logdir).refused(404, "/matrix", **PROBLEM)


def test_a_file_of_other_samples(logdir):
    rewrite(logdir / "run", 10, arrays={"gradient": np.zeros((3, 2, 9))})
    assert "of another measurement than the event" in Tab(logdir).refused(404, "/problem", **PROBLEM)


def test_a_file_of_another_measurement(logdir, records):
    save_record(dataclasses.replace(records[1], logged_step=8), logdir / "run")
    assert "of another measurement than the event" in Tab(logdir).refused(404, "/problem", **PROBLEM)


def test_a_file_of_another_session(records, tmp_path):
    """The event of a resumed run was written, its file was not yet: the older file has the same step."""
    write_run(tmp_path / "run", records[1:2], session=Session("new", 2.0, 0))
    save_record(records[1], tmp_path / "run", Session("old", 1.0, None))
    assert "of another measurement than the event" in Tab(tmp_path).refused(404, "/problem", **PROBLEM)
    save_record(records[1], tmp_path / "run", Session("new", 2.0, 0))
    assert Tab(tmp_path).get("/problem", **PROBLEM).status_code == 200
    save_record(records[1], tmp_path / "run")  # of no known session
    assert Tab(tmp_path).get("/problem", **PROBLEM).status_code == 200


@pytest.mark.parametrize("index", [[0, 1, 2, 9], [-1, 0, 1, 2], [0, 1]])
def test_eigenvectors_that_do_not_fit(logdir, index):
    wrong = np.broadcast_to(np.array(index), (2, 2, len(index)))
    rewrite(logdir / "run", 10, arrays={**NO_MATRIX, "vector_index": wrong})
    tab = Tab(logdir)
    assert "do not fit" in tab.refused(404, "/problem", **PROBLEM)
    assert "do not fit" in tab.refused(404, "/matrix", **PROBLEM)


def test_part_of_the_eigenvectors_is_not_the_matrix(logdir):
    rewrite(logdir / "run", 10, arrays=NO_MATRIX)
    assert "kept of no sample at this step" in Tab(logdir).refused(404, "/matrix", **PROBLEM)


def test_a_matrix_too_large_to_be_drawn_still_has_rows(logdir, monkeypatch):
    monkeypatch.setattr(plugin, "LARGEST_DRAWN", 8)
    tab = Tab(logdir)
    assert "too large to be drawn" in tab.refused(404, "/matrix", **PROBLEM)
    assert tab.get("/row", **PROBLEM, index=0).status_code == 200


def test_words_that_json_does_not_know(records, tmp_path):
    arrays, meta = unpack(pack_summary(records[1]))
    payload = save(arrays, {"lightning_hessian": json.dumps({**meta, "seconds": float("nan"), "list": [float("inf")]})})
    write_run(tmp_path / "run", records[1:2], payload=payload)
    tab = Tab(tmp_path)
    for route in ("/series", "/summary", "/problem"):
        assert b"NaN" not in tab.get(route, **PROBLEM).data
    assert np.isnan(tab.arrays("/series", **RUN)[0]["seconds"]).all()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\x00" * 8,
        (2**60).to_bytes(8, "little") + b"{}",
        save({"lambda_max": np.zeros(3)}, {"lightning_hessian": '{"step": 1, "num_inputs": 9}'}),
        save({"lambda_max": np.zeros((2, 2))}, {"lightning_hessian": '{"step": -1, "num_inputs": 9}'}),
        save({"lambda_max": np.zeros((2, 2))}, {"lightning_hessian": '{"step": "../x", "num_inputs": 9}'}),
        save(
            {"lambda_max": np.zeros((2, 2)), "trace": np.zeros(2)},
            {"lightning_hessian": '{"step": 1, "num_inputs": 9}'},
        ),
        save(
            {"lambda_max": np.zeros((2, 2)), "eigenvalues": np.zeros((2, 2, 3)), "residuals": np.zeros((2, 2, 2))},
            {"lightning_hessian": '{"step": 1, "num_inputs": 9}'},
        ),
    ],
)
def test_a_damaged_event(records, tmp_path, payload):
    write_run(tmp_path / "run", records[:1])
    write_run(tmp_path / "run", records[1:2], payload=payload, start=1_800_000_000.0)
    write_run(tmp_path / "only", records[:1], payload=payload)
    tab = Tab(tmp_path)
    _, meta = tab.arrays("/series", **RUN)
    assert meta["left_out"] == "Left out: 1 measurements that are damaged."
    assert "None of the 1 measurements" in tab.refused(404, "/series", run="only", tag="input_hessian")
    only = tab.get("/runs").json["runs"][0]["tags"][0]
    assert "None of the 1 measurements" in only["error"]


def test_an_event_of_another_layout(records, tmp_path):
    write_run(tmp_path / "run", records, layout=2)
    assert "Update the package" in Tab(tmp_path).refused(404, "/series", **RUN)


def test_a_failure_is_told_and_logged(logdir, monkeypatch, caplog):
    tab = Tab(logdir)
    monkeypatch.setattr(tab.plugin._files, "open", None)
    assert "TypeError" in tab.refused(500, "/problem", **PROBLEM)
    assert "no answer to" in caplog.text
