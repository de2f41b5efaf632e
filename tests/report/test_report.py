"""The standalone page: what is in it is what was recorded, and it asks nobody for anything."""

import base64
import dataclasses
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import load
from support.quadratic import quadratic_record

from lightning_hessian import load_records, write_report
from lightning_hessian.cli import main
from lightning_hessian.records.event_format import METRICS
from lightning_hessian.records.files import save_record
from lightning_hessian.report.contents import find_runs, gather, maps_of, narrow, packed_matrix, spread_out
from lightning_hessian.report.page import STATIC, import_map


class Page(HTMLParser):
    """The scripts, by id and by type, and every address, of a page."""

    def __init__(self, path):
        super().__init__()
        self.open, self.text, self.addresses, self.batch = [], {}, [], []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        self.addresses += [told[name] for name in ("src", "href", "action", "data") if name in told]
        if tag not in ("meta", "link"):
            self.open.append(tag)
            self.at = told.get("id") or told.get("type") or tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style", "title"):
            self.text[self.at] = self.text.get(self.at, "") + data

    @property
    def catalog(self):
        return json.loads(self.text["catalog"])

    def arrays(self, name):
        return load(gzip.decompress(base64.b64decode(self.text[f"block-{name}"])))

    def meta(self, name):
        payload = gzip.decompress(base64.b64decode(self.text[f"block-{name}"]))
        header = json.loads(payload[8 : 8 + int.from_bytes(payload[:8], "little")])
        return json.loads(header["__metadata__"]["lightning_hessian"])


def save_run(folder, num_steps=3, **changes):
    for step in range(num_steps):
        record = quadratic_record(3.0 + step, 1.0, -2.0, 0.1, shape=(2, 2), num_samples=2, step=step, logged_step=step)
        save_record(dataclasses.replace(record, **changes), folder)


@pytest.fixture
def page(tmp_path):
    save_run(tmp_path / "logs" / "a")
    save_run(tmp_path / "logs" / "b", num_steps=2)
    return Page(write_report(tmp_path / "logs", tmp_path / "report.html"))


def test_the_page_holds_the_numbers_of_the_records(page, tmp_path):
    """Whatever the page shows comes back from its blocks as it was recorded."""
    told = {blocks["run"]: blocks for blocks in page.catalog["blocks"]}
    assert list(told) == ["a", "b"]
    for run, blocks in told.items():
        records = load_records(tmp_path / "logs" / run)
        series = page.arrays(blocks["series"])
        assert series["steps"].tolist() == [record.logged_step for record in records]
        for metric in METRICS:
            np.testing.assert_allclose(series[metric], [getattr(r, metric) for r in records], rtol=1e-6)
        ends = [record.residuals[..., 0] for record in records]
        np.testing.assert_allclose(series["lambda_max_error"], ends, rtol=1e-6)
        assert not series["lambda_max_open"].any()
        for place, record in enumerate(records):
            spectra = page.arrays(blocks["spectra"][place])
            np.testing.assert_allclose(spectra["eigenvalues"], record.eigenvalues, rtol=1e-6)
            np.testing.assert_array_equal(spectra["converged"], record.converged)
            np.testing.assert_array_equal(page.arrays(blocks["x"][str(place)])["x"], record.x)
            maps = page.arrays(blocks["maps"][str(place)])
            for name in ("gradient", "diagonal", "diagonal_error", "eigenvectors"):
                np.testing.assert_allclose(maps[name], getattr(record, name), rtol=1e-6, atol=0)
            chosen = np.take_along_axis(record.eigenvalues, record.vector_index, axis=-1)
            np.testing.assert_allclose(maps["vector_eigenvalues"], chosen, rtol=1e-6)
            for problem, name in blocks["matrices"][str(place)].items():
                sample, column = map(int, problem.split(","))
                triangle = page.arrays(name)["triangle"]
                np.testing.assert_allclose(triangle, record.hessian[sample, column][np.triu_indices(4)], rtol=1e-6)


def test_what_is_the_same_is_there_once(page):
    names = [name for blocks in page.catalog["blocks"] for name in blocks["x"].values()]
    assert len(names) == 5
    assert len(set(names)) == 1


def test_the_list_of_runs(page):
    (first, _) = page.catalog["runs"]["runs"]
    (tag,) = first["tags"]
    assert tag["tag"] == "input_hessian"
    assert tag["steps"] == [0, 1, 2]
    assert (tag["num_samples"], tag["num_inputs"], tag["shape"]) == (2, 4, [2, 2])
    assert tag["left_out"] is None
    told = page.meta(page.catalog["blocks"][0]["series"])["summaries"]
    assert [(summary["logged_step"], summary["method"]) for summary in told] == [(step, "dense") for step in range(3)]


def test_no_address_leads_out_of_the_page(page):
    """Nothing is fetched: no address but data, no relative import left, and a policy that would stop either."""
    assert [address for address in page.addresses if not address.startswith("data:")] == []
    modules = json.loads(page.text["importmap"])["imports"]
    assert set(modules) == {f"input_hessian/{path.relative_to(STATIC).as_posix()}" for path in STATIC.rglob("*.js")}
    for url in modules.values():
        text = base64.b64decode(url.removeprefix("data:text/javascript;base64,")).decode()
        asked = re.findall(r"""\b(?:from|import)\s*\(?\s*["']([^"']+)["']""", text)
        assert set(asked) <= set(modules)
        assert "http://" not in text
        assert "https://" not in text
    assert page.text["module"].strip() == 'import "input_hessian/report_page.js";'
    assert re.findall(r"url\(|@import", page.text["style"]) == []


def test_the_policy_forbids_every_request(tmp_path):
    save_run(tmp_path / "a", 1)
    text = write_report(tmp_path / "a", tmp_path / "report.html").read_text("utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert policy.startswith("default-src &#x27;none&#x27;;")
    assert "connect-src" not in policy
    assert "http" not in policy


def test_imports_between_folders_of_modules():
    name = "input_hessian/views/hessian.js"
    text = base64.b64decode(import_map()[name].split(",")[1]).decode()
    assert 'from "input_hessian/dom.js"' in text


def test_names_cannot_break_the_page(tmp_path):
    name = "</script><b>&amp;"
    save_run(tmp_path / "x" / name.replace("/", "_"), 1, class_names=("</script><!--",))
    page = Page(write_report(tmp_path / "x", tmp_path / "report.html"))
    (run,) = page.catalog["runs"]["runs"]
    assert run["run"] == "<_script><b>&amp;"
    assert run["tags"][0]["class_names"] == ["</script><!--"]


def test_what_does_not_fit_is_left_out_and_told(tmp_path):
    """First matrices go, then maps, then measurements; the last one stays whole as long as it can."""
    generator = np.random.default_rng(0)
    for step in range(4):
        record = quadratic_record(*generator.normal(size=100), step=step, logged_step=step, num_samples=2)
        noise = generator.normal(size=record.hessian.shape)
        save_record(dataclasses.replace(record, hessian=noise + noise.swapaxes(-1, -2)), tmp_path / "run")
    runs = find_runs([tmp_path / "run"])
    ((all_,), store) = gather(runs, 10**9)
    assert all_.notes == []
    assert sum(map(len, all_.blocks["matrices"].values())) == 8
    ((most,), part) = gather(runs, store.size - 80_000)
    num_matrices = sum(map(len, most.blocks["matrices"].values()))
    assert 2 <= num_matrices < 8
    assert set(most.blocks["matrices"][3]) == {"0,0", "1,0"}
    assert most.notes == [f"Matrices: {num_matrices} of 8 that were kept are on this page."]
    ((few,), least) = gather(runs, 8_000)
    assert few.paths[-1] == all_.paths[-1]
    assert few.notes[0] == f"{len(few.paths)} of 4 measurements are on this page."
    assert len(few.blocks["spectra"]) == len(few.summaries) == len(few.paths) < 4
    assert not few.blocks["matrices"]
    for parts, limit in ((part, store.size - 80_000), (least, 8_000)):
        assert sum(map(len, parts.blocks.values())) <= limit


def test_the_page_is_no_larger_than_wanted(tmp_path):
    save_run(tmp_path / "run", 2)
    whole = write_report(tmp_path / "run", tmp_path / "r.html").stat().st_size
    smaller = write_report(tmp_path / "run", tmp_path / "r.html", max_size=(whole - 1000) / 1e6)
    assert smaller.stat().st_size <= whole - 1000
    assert "are on this page" in Page(smaller).text["catalog"]


def test_measurements_that_cannot_be_compared_are_told(tmp_path):
    save_record(quadratic_record(1.0, 2.0, step=0, logged_step=0), tmp_path / "run")
    save_record(quadratic_record(1.0, 2.0, 3.0, step=1, logged_step=1), tmp_path / "run")
    (run,) = Page(write_report(tmp_path / "run", tmp_path / "r.html")).catalog["runs"]["runs"]
    assert run["tags"][0]["steps"] == [1]
    assert "1 measurement was of other samples" in run["tags"][0]["left_out"]


def test_two_measurements_at_one_logged_step_are_told(tmp_path):
    for step in range(2):  # before training and after the first step
        save_record(quadratic_record(1.0 + step, 2.0, step=step, logged_step=0), tmp_path / "run")
    (run,) = Page(write_report(tmp_path / "run", tmp_path / "r.html")).catalog["runs"]["runs"]
    assert run["tags"][0]["steps"] == [0]
    assert "1 measurement was followed by a later one at the same logged step" in run["tags"][0]["left_out"]


def test_half_precision_of_kept_matrices_is_told(tmp_path):
    for storage in ("float16", "upper_triangle"):
        save_record(quadratic_record(1.0, -2.0), tmp_path / storage, storage=storage)
        page = Page(write_report(tmp_path / storage, tmp_path / "r.html"))
        (summary,) = page.meta(page.catalog["blocks"][0]["series"])["summaries"]
        assert (summary["precision"] is not None) == (storage == "float16")


def test_every_monitor_of_a_run_has_its_tag(tmp_path):
    save_run(tmp_path / "run", 1)
    save_run(tmp_path / "run", 2, name="logits")
    (run,) = Page(write_report([tmp_path / "run"], tmp_path / "r.html")).catalog["runs"]["runs"]
    assert [(tag["tag"], tag["name"], tag["steps"]) for tag in run["tags"]] == [
        ("input_hessian", None, [0]),
        ("input_hessian/logits", "logits", [0, 1]),
    ]


def test_a_test_after_the_fit_is_apart_from_its_curves(tmp_path):
    save_run(tmp_path / "run", 2)
    save_record(quadratic_record(5.0, 1.0, step=1, logged_step=1, stage="test"), tmp_path / "run")
    (run,) = Page(write_report(tmp_path / "run", tmp_path / "r.html")).catalog["runs"]["runs"]
    assert [(tag["tag"], tag["steps"]) for tag in run["tags"]] == [
        ("input_hessian", [0, 1]),
        ("input_hessian_test", [1]),
    ]


def test_runs_are_named_from_the_directory_above_them_all(tmp_path):
    for run in ("logs/a/version_0", "logs/a/version_1", "other"):
        save_run(tmp_path / run, 1)
    assert list(find_runs([tmp_path / "logs"])) == ["version_0", "version_1"]
    assert list(find_runs([tmp_path / "logs/a/version_1"])) == ["version_1"]
    both = find_runs([tmp_path / "logs", tmp_path / "other"])
    assert list(both) == ["logs/a/version_0", "logs/a/version_1", "other"]


def test_numbers_are_narrowed_only_where_nothing_changes():
    for values, dtype in [
        ([0.5, 2048.0, np.nan, np.inf], np.float16),
        ([0.1, 1e-30], np.float32),
        ([0.1, 1e-50], np.float64),
        ([0.1, 1e50], np.float64),
    ]:
        narrowed = narrow(np.array(values))
        assert narrowed.dtype == dtype
        np.testing.assert_allclose(narrowed, values, rtol=1e-6, atol=0)


def test_a_matrix_that_is_not_symmetric_is_kept_as_it_is():
    matrix = np.array([[1.0, 2.0], [3.0, 4.0]])
    np.testing.assert_array_equal(packed_matrix(matrix)["matrix"], matrix)


def test_eigenvectors_make_up_the_matrix_where_no_eigenvalue_is_without_one():
    record = quadratic_record(3.0, 1.0, -2.0, 0.0)
    assert maps_of(record)["whole"].all()
    few = {"eigenvectors": record.eigenvectors[..., :2, :], "vector_index": record.vector_index[..., :2]}
    assert not maps_of(dataclasses.replace(record, **few))["whole"].any()
    assert not maps_of(dataclasses.replace(record, complete=False))["whole"].any()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 300])
def test_the_last_and_the_first_come_first_and_each_once(count):
    order = spread_out(count)
    assert sorted(order) == list(range(count))
    assert order[0] == count - 1
    assert order[1:2] in ([], [0])


def test_the_command(tmp_path, capsys):
    save_run(tmp_path / "run", 1)
    output = tmp_path / "out.html"
    output.write_text("old")
    assert main(["report", str(tmp_path / "run"), "-o", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"Wrote {output} (")
    assert Page(output).catalog["title"] == "Input-Hessian: run"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "There is no directory .*nowhere"),
        (["empty"], "No records in .*empty or below it: give the directory that holds a run's event file"),
        (["run", "-o", "nowhere/out.html"], "There is no directory nowhere to write out.html into"),
        (["run", "--max-size", "1"], "max_size is 1 MB, but the page without any data takes"),
        (["damaged"], "step_000000000.safetensors is not a record of lightning-hessian, or damaged"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(arguments, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    save_run(tmp_path / "run", 1)
    save_run(tmp_path / "damaged", 1)
    (tmp_path / "damaged" / "input_hessian" / "step_000000000.safetensors").write_bytes(b"\x00" * 20)
    assert main(["report", *arguments]) == 1
    told = capsys.readouterr().err
    assert re.match(f"lightning-hessian: .*{sentence}", told)
    assert told.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))
    assert not list(tmp_path.glob(".*"))


def test_an_output_stays_as_it_was_where_writing_fails(tmp_path, monkeypatch):
    save_run(tmp_path / "run", 1)
    output = tmp_path / "out.html"
    output.write_text("old")

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space"):
        write_report(tmp_path / "run", output)
    assert output.read_text() == "old"
    assert not list(tmp_path.glob(".*"))
