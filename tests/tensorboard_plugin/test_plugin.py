"""What the routes answer is what was measured, through TensorBoard's own data provider."""

import dataclasses

import grpc
import numpy as np
import pytest
from support.invalid import FOUR_SAMPLES, MESSAGE, invalidated
from support.make_run import START, Tab, later, train, unpack, write_run
from support.training import fit, small_monitor
from torch import nn

from lightning_hessian import load_records
from lightning_hessian.records import event_format
from lightning_hessian.records.answers.history import PER_STEP, metric_table
from lightning_hessian.records.event_format import pack_summary
from lightning_hessian.records.files import save_record
from lightning_hessian.records.histogram import BIN_EDGES
from lightning_hessian.records.matrices import from_triangle
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.tensorboard_plugin import static_files

RUN = {"run": "exp/gelu", "tag": "input_hessian"}
RELU = {"run": "exp/relu", "tag": "input_hessian/late"}


@pytest.fixture(scope="module")
def curved():
    return train()


@pytest.fixture(scope="module")
def piecewise():
    """Measurements of a ReLU network: four eigenvalues are the whole spectrum."""
    return [dataclasses.replace(r, hessian=None, name="late") for r in train(nn.ReLU)]


@pytest.fixture(scope="module")
def tab(curved, piecewise, tmp_path_factory):
    logdir = tmp_path_factory.mktemp("logs")
    write_run(logdir / "exp" / "gelu", curved)
    write_run(logdir / "exp" / "relu", piecewise, tag=RELU["tag"])
    return Tab(logdir)


def test_runs(tab, curved):
    answer = tab.get("/runs").json
    assert answer["format"] == 2
    assert answer["metrics"][0]["title"] == "largest λ"
    assert [r["run"] for r in answer["runs"]] == ["exp/gelu", "exp/relu"]
    (tag,) = answer["runs"][0]["tags"]
    assert tag == {
        "tag": "input_hessian",
        "name": None,
        "target": "prob",
        "class_ids": [1, 3],
        "class_names": None,
        "has_classes": True,
        "num_samples": 2,
        "num_inputs": 9,
        "shape": [1, 3, 3],
        "steps": [r.logged_step for r in curved],
        "epochs": [0, 1, 2],
        "written": [START, START + 1, START + 2],
        "files": True,
        "why_no_files": None,
        "left_out": None,
    }


def test_series(tab, curved):
    arrays, meta = tab.arrays("/series", **RUN)
    np.testing.assert_array_equal(arrays["steps"], [0, 9, 19])
    np.testing.assert_array_equal(arrays["epochs"], [0, 1, 2])
    for metric in METRICS:
        expected = np.stack([getattr(r, metric.name) for r in curved]).astype(np.float32)
        np.testing.assert_array_equal(arrays[metric.name], expected, err_msg=metric.name)
    np.testing.assert_array_equal(arrays["labels"], [[0, 1]] * 3)
    np.testing.assert_array_equal(arrays["classes"], [[[1, 3]] * 2] * 3)
    np.testing.assert_array_equal(arrays["predicted"], np.stack([r.predicted for r in curved]))
    np.testing.assert_allclose(arrays["seconds"], [r.seconds for r in curved], rtol=1e-6)
    assert meta["method"] == [r.method for r in curved]
    assert meta["message"] == [r.message for r in curved]
    assert meta["step"] == [0, 10, 20]


def test_spectra(tab, curved):
    arrays, meta = tab.arrays("/spectra", **RUN, sample=1, class_id=1)
    assert meta == {"histogram": ["exact"] * 3, "left_out": None}
    expected = np.stack([r.eigenvalues[1, 0] for r in curved])
    np.testing.assert_array_equal(arrays["eigenvalues"], expected)
    np.testing.assert_array_equal(arrays["converged"], np.ones_like(expected))
    np.testing.assert_array_equal(arrays["bin_edges"], BIN_EDGES.astype(np.float32))
    np.testing.assert_allclose(arrays["histogram"].sum(axis=1), 9, rtol=1e-5)


def test_spectra_of_different_lengths_are_filled_with_nan(curved, tmp_path):
    listed = {name: getattr(curved[1], name)[..., :3] for name in ("eigenvalues", "residuals", "converged")}
    write_run(tmp_path / "run", [curved[0], dataclasses.replace(curved[1], **listed)])
    arrays, _ = Tab(tmp_path).arrays("/spectra", run="run", tag="input_hessian", sample=0, class_id=3)
    assert np.isnan(arrays["eigenvalues"][1, 3:]).all()
    np.testing.assert_array_equal(arrays["eigenvalues"][1, :3], curved[1].eigenvalues[0, 1, :3])


def test_what_is_answered_at_one_step_is_its_event(tab, curved):
    answer = tab.get("/series", **RUN)
    (arrays, meta), (expected, written) = unpack(answer.data), unpack(pack_summary(curved[1]))
    for name in PER_STEP:
        assert meta[name][1] == written[name], name
    problems = [tab.arrays("/spectra", **RUN, sample=n, class_id=k)[0] for n in (0, 1) for k in (1, 3)]
    for name, array in expected.items():
        found = arrays[name][1] if name in arrays else np.stack([each[name][1] for each in problems])
        np.testing.assert_array_equal(found.reshape(array.shape), array, err_msg=name)
    assert answer.content_type == "application/octet-stream"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


def test_input_and_maps(tab, curved):
    record = curved[2]
    arrays, meta = tab.arrays("/input", **RUN, step=19, sample=1)
    np.testing.assert_array_equal(arrays["x"], record.x[1])
    assert meta["shape"] == [1, 3, 3]
    arrays, meta = tab.arrays("/maps", **RUN, step=19, sample=1, class_id=3)
    for name in ("gradient", "diagonal", "diagonal_error"):
        np.testing.assert_array_equal(arrays[name], getattr(record, name)[1, 1])
    np.testing.assert_array_equal(arrays["eigenvectors"], record.eigenvectors[1, 1])
    index = record.vector_index[1, 1]
    np.testing.assert_array_equal(arrays["eigenvector_values"], record.eigenvalues[1, 1, index])
    np.testing.assert_array_equal(arrays["eigenvector_residuals"], record.residuals[1, 1, index])
    np.testing.assert_array_equal(arrays["eigenvector_converged"], record.converged[1, 1, index])
    assert meta["matrix"] == "none"
    assert "stored only for sample 0 at this step" in meta["why_no_matrix"]
    assert meta["largest_diagonal_error"] == 0
    assert tab.arrays("/maps", **RUN, step=19, sample=0, class_id=3)[1]["matrix"] == "stored"


def test_stored_matrix_and_rows(tab, curved):
    hessian = curved[1].hessian[0, 1]
    arrays, meta = tab.arrays("/matrix", **RUN, step=9, sample=0, class_id=3)
    np.testing.assert_array_equal(from_triangle(arrays["triangle"], 9), hessian)
    assert meta["limit"] == pytest.approx(np.percentile(np.abs(hessian), 99))
    assert meta["largest"] == np.abs(hessian).max()
    assert (meta["size"], meta["block"], meta["source"]) == (9, 1, "stored")
    for index in range(9):
        row, _ = tab.arrays("/row", **RUN, step=9, sample=0, class_id=3, index=index)
        np.testing.assert_array_equal(row["row"], hessian[index])


def test_matrix_and_rows_from_eigenvectors(tab, piecewise):
    record = piecewise[1]
    values = record.eigenvalues[1, 0, record.vector_index[1, 0]]
    expected = np.einsum("vi,v,vj->ij", record.eigenvectors[1, 0], values, record.eigenvectors[1, 0])
    arrays, meta = tab.arrays("/matrix", **RELU, step=9, sample=1, class_id=1)
    assert meta["source"] == "from eigenvectors"
    found = from_triangle(arrays["triangle"], 9)
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_array_equal(found, record.matrix(1, 1))
    row, _ = tab.arrays("/row", **RELU, step=9, sample=1, class_id=1, index=4)
    np.testing.assert_allclose(row["row"], expected[4], atol=1e-6 * np.abs(expected).max())


def test_matrices_are_those_of_the_loaded_record(curved, tmp_path):
    write_run(tmp_path / "run", curved[:1])
    (record,) = load_records(tmp_path / "run")
    tab, which = Tab(tmp_path), {"run": "run", "tag": "input_hessian", "step": 0, "sample": 0, "class_id": 3}
    drawn, _ = tab.arrays("/matrix", **which)
    np.testing.assert_array_equal(from_triangle(drawn["triangle"], 9), record.matrix(0, 3))
    for index in range(9):
        row, _ = tab.arrays("/row", **which, index=index)
        np.testing.assert_array_equal(row["row"], record.matrix(0, 3)[index])


@pytest.mark.parametrize("class_id", ["label", "predicted"])
def test_classes_that_depend_on_the_sample(curved, tmp_path, class_id):
    one = [dataclasses.replace(curved[0], class_ids=(class_id, 3))]
    write_run(tmp_path / "run", one)
    tab, which = Tab(tmp_path), {"run": "run", "tag": "input_hessian", "sample": 1, "class_id": class_id}
    assert tab.get("/runs").json["runs"][0]["tags"][0]["class_ids"] == [class_id, 3]
    np.testing.assert_array_equal(tab.arrays("/maps", **which, step=0)[0]["gradient"], curved[0].gradient[1, 0])
    assert tab.error(400, "/spectra", **{**which, "class_id": 1}) == f"class_id='1' must be one of {class_id}, 3."


def test_the_event_says_which_samples_have_matrices(curved, tmp_path):
    payload = pack_summary(curved[0]).replace(b'\\"matrices\\":[0]', b'\\"matrices\\":[1]')
    write_run(tmp_path / "run", curved[:1], payload=payload)
    tab, which = Tab(tmp_path), {"run": "run", "tag": "input_hessian", "step": 0, "class_id": 1}
    triangle = tab.arrays("/matrix", **which, sample=1)[0]["triangle"]
    np.testing.assert_array_equal(from_triangle(triangle, 9), curved[0].hessian[0, 0])
    assert "stored only for sample 1" in tab.error(404, "/matrix", **which, sample=0)


def test_steps_that_a_resumed_run_wrote_anew_count_once(curved, tmp_path):
    """Steps 0, 9, 19 and then, from a checkpoint of step 0, 9 and 12: the first 9 and 19 are superseded."""
    write_run(tmp_path / "run", curved)
    again = [
        dataclasses.replace(curved[2], step=10, logged_step=9),
        dataclasses.replace(curved[1], step=13, logged_step=12),
    ]
    write_run(tmp_path / "run", again, start=START + 100)
    arrays, _ = Tab(tmp_path).arrays("/series", run="run", tag="input_hessian")
    np.testing.assert_array_equal(arrays["steps"], [0, 9, 12])
    np.testing.assert_array_equal(arrays["trace"][1], curved[2].trace.astype(np.float32))


def test_a_measurement_hidden_by_a_later_one_at_its_logged_step_is_reported(curved, tmp_path):
    """Before training and after the first step, both at the loggers' step 0."""
    after = dataclasses.replace(curved[1], step=1, logged_step=0)
    write_run(tmp_path / "run", [curved[0], after])
    arrays, meta = Tab(tmp_path).arrays("/series", run="run", tag="input_hessian")
    np.testing.assert_array_equal(arrays["trace"], [after.trace.astype(np.float32)])
    assert meta["left_out"] == "Left out: 1 measurement followed by a later one at the same logged step."


def test_new_measurements_are_seen_while_training_goes_on(curved, tmp_path):
    write_run(tmp_path / "run", curved[:1])
    tab = Tab(tmp_path)
    assert tab.get("/runs").json["runs"][0]["tags"][0]["steps"] == [0]
    write_run(tmp_path / "run", curved[1:], start=START + 100)
    write_run(tmp_path / "another", curved[:1])
    tab.reload()
    assert [r["tags"][0]["steps"] for r in tab.get("/runs").json["runs"]] == [[0], [0, 9, 19]]
    assert len(tab.arrays("/series", run="run", tag="input_hessian")[0]["steps"]) == 3


def test_more_measurements_than_tensorboard_keeps_by_itself(curved, tmp_path):
    many = [later(curved[:1], step=10 * i)[0] for i in range(120)]
    write_run(tmp_path / "run", many, files=False)
    series = {"run": "run", "tag": "input_hessian"}
    assert len(Tab(tmp_path).arrays("/series", **series)[0]["steps"]) == 120
    chosen = Tab(tmp_path, samples_per_plugin={"input_hessian": 7})
    assert len(chosen.arrays("/series", **series)[0]["steps"]) == 7


def test_measurements_of_other_samples_are_left_out_and_reported(curved, tmp_path):
    one = {
        field.name: value[:1]
        for field in dataclasses.fields(curved[0])
        if isinstance(value := getattr(curved[0], field.name), np.ndarray)
    }
    one["metrics"] = {name: values[:1] for name, values in curved[0].metrics.items()}
    write_run(tmp_path / "run", [dataclasses.replace(curved[0], **one), *curved[1:]])
    arrays, meta = Tab(tmp_path).arrays("/series", run="run", tag="input_hessian")
    np.testing.assert_array_equal(arrays["steps"], [9, 19])
    assert meta["left_out"] == "Left out: 1 measurement of other samples, classes or targets than the last."


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_a_measurement_outside_of_a_fit(curved, tmp_path, stage):
    outside = dataclasses.replace(curved[2], stage=stage, name="late")
    tag = event_format.tag("late", stage)
    write_run(tmp_path / "run", [outside], tag=tag)
    save_record(dataclasses.replace(curved[1], name="late", step=20, logged_step=19), tmp_path / "run")
    request = {"run": "run", "tag": tag, "step": 19, "sample": 0, "class_id": 1}
    np.testing.assert_array_equal(Tab(tmp_path).arrays("/maps", **request)[0]["gradient"], curved[2].gradient[0, 0])


class Exhausted(grpc.RpcError):
    def code(self):
        return grpc.StatusCode.RESOURCE_EXHAUSTED


def test_more_than_tensorboard_hands_over_at_once(curved, tmp_path, monkeypatch):
    write_run(tmp_path / "run", curved)
    tab = Tab(tmp_path)
    provider, read = tab.ingester.data_provider, tab.ingester.data_provider.read_tensors

    def limited(ctx, *, downsample, **where):
        if downsample > 2:
            raise Exhausted
        return read(ctx, downsample=downsample, **where)

    monkeypatch.setattr(provider, "read_tensors", limited)
    arrays, meta = tab.arrays("/series", run="run", tag="input_hessian")
    assert len(arrays["steps"]) == 2
    assert arrays["steps"][-1] == 19
    assert "256 MiB" in meta["left_out"]


def test_a_run_of_a_real_trainer(tmp_path):
    fit(tmp_path / "logs" / "run", small_monitor(name="late"))
    records = load_records(tmp_path / "logs" / "run", name="late")
    tab, request = Tab(tmp_path / "logs"), {"run": "run", "tag": "input_hessian/late"}
    arrays, meta = tab.arrays("/series", **request)
    np.testing.assert_array_equal(arrays["steps"], [r.logged_step for r in records])
    np.testing.assert_array_equal(arrays["lambda_max"], np.stack([r.lambda_max for r in records]).astype(np.float32))
    assert meta["step"] == [r.step for r in records]
    last = records[-1]
    row, _ = tab.arrays("/row", **request, step=last.logged_step, sample=0, class_id=3, index=27)
    np.testing.assert_array_equal(row["row"], last.matrix(0, 3)[27])


def test_no_data(tmp_path):
    assert Tab(tmp_path).get("/runs").json == {"format": 2, "metrics": metric_table(), "runs": []}


def test_logdir_spec_shows_spectra_and_says_why_there_is_no_matrix(curved, tmp_path):
    folder = write_run(tmp_path / "run", curved)
    tab = Tab(None, logdir_spec=f"mine:{folder}")
    (run,) = tab.get("/runs").json["runs"]
    (tag,) = run["tags"]
    assert not tag["files"]
    assert "--logdir_spec" in tag["why_no_files"]
    assert len(tab.arrays("/spectra", run=run["run"], tag="input_hessian", sample=0, class_id=1)[0]["steps"]) == 3
    request = {"run": run["run"], "tag": "input_hessian", "step": 0, "sample": 0, "class_id": 1}
    assert "--logdir_spec" in tab.error(404, "/matrix", **request)


def test_a_run_without_files(curved, tmp_path):
    write_run(tmp_path, curved, files=False)
    tab = Tab(tmp_path)
    (run,) = tab.get("/runs").json["runs"]
    assert run["run"] == "."
    assert "not copied" in run["tags"][0]["why_no_files"]
    request = {"run": ".", "tag": "input_hessian", "step": 0, "sample": 0, "class_id": 1}
    assert "file of step 0 is not beside" in tab.error(404, "/maps", **request)


def test_the_page_and_plotly(tmp_path, monkeypatch):
    (tmp_path / "static" / "views").mkdir(parents=True)
    (tmp_path / "static" / "index.js").write_text("export const render = 1;\n")
    (tmp_path / "static" / "views" / "a.css").write_text("p {}\n")
    (tmp_path / "secret.js").write_text("no")
    (tmp_path / "static" / "link.js").symlink_to(tmp_path / "secret.js")
    (tmp_path / "static" / "notes.txt").write_text("no")
    monkeypatch.setattr(static_files, "FOLDER", tmp_path / "static")
    tab = Tab(tmp_path)
    assert tab.plugin.frontend_metadata().es_module_path == "/index.js"
    for route in ("/index.js", "/static/index.js"):
        answer = tab.get(route)
        assert answer.text == "export const render = 1;\n"
        assert answer.mimetype == "text/javascript"
    assert tab.get("/static/views/a.css").mimetype == "text/css"
    routes = set(tab.plugin.get_plugin_apps())
    assert not {r for r in routes if "link" in r or "notes" in r or "*" in r}


def test_plotly_is_the_packages_own(tmp_path):
    import plotly.offline

    answer = Tab(tmp_path).get("/plotly.min.js")
    assert answer.text == plotly.offline.get_plotlyjs()
    assert answer.mimetype == "text/javascript"


@pytest.mark.parametrize("case", FOUR_SAMPLES)
@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_what_is_not_valid_has_no_numbers_and_no_matrix_and_says_why(case, activation, tmp_path):
    """At the last of three steps; the ReLU network's eigenvectors would give every matrix."""
    records = train(activation, num_samples=4)
    valid = np.array(FOUR_SAMPLES[case], bool)
    write_run(tmp_path / "run", [*records[:2], invalidated(records[2], valid)])
    tab, which = Tab(tmp_path), {"run": "run", "tag": "input_hessian"}
    arrays, meta = tab.arrays("/series", **which)
    np.testing.assert_array_equal(arrays["valid"], [np.ones((4, 2)), np.ones((4, 2)), valid])
    np.testing.assert_array_equal(np.isnan(arrays["trace"][2]), ~valid)
    for k in range(2):
        kept = valid[:, k]
        mean = records[2].trace[kept, k].mean() if kept.any() else np.nan
        np.testing.assert_allclose(arrays["trace_mean"][2, k], mean, rtol=1e-5)
    assert meta["message"][2] == MESSAGE
    assert meta["validity"][0].startswith("Agrees with finite differences to ")
    assert meta["validity"][0].endswith(" (at 4 of 4 samples).")
    assert meta["validity"][2].endswith("; the diagnosis says why.")
    for n, k in np.ndindex(4, 2):
        at = {**which, "step": 19, "sample": n, "class_id": (1, 3)[k]}
        assert tab.arrays("/input", **which, step=19, sample=n)[0]["x"].shape == (1, 3, 3)
        arrays, meta = tab.arrays("/maps", **at)
        spectra = tab.arrays("/spectra", **which, sample=n, class_id=at["class_id"])[0]
        assert spectra["valid"].tolist() == [1, 1, valid[n, k]]
        assert np.isfinite(spectra["eigenvalues"][2]).any() == valid[n, k]
        assert np.isfinite(arrays["gradient"]).all() == valid[n, k]
        if not valid[n, k]:
            assert meta["matrix"] == "none"
            for route, more in (("/matrix", {}), ("/row", {"index": 0})):
                sentence = tab.error(404, route, **at, **more)
                assert sentence == f"Its Hessian is not valid at this step, so nothing is shown of it. {MESSAGE}"
                assert sentence == meta["why_no_matrix"]
        elif n == 0 or activation is nn.ReLU:
            assert np.isfinite(tab.arrays("/matrix", **at)[0]["triangle"]).all()
