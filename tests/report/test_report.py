"""The standalone page: its content is what was recorded, and it requests nothing."""

import base64
import dataclasses
import gzip
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from support.invalid import MESSAGE, invalidated
from support.make_run import Tab, train, unpack, write_run
from support.quadratic import quadratic_record
from torch import nn

from lightning_hessian import load_records, write_report
from lightning_hessian.cli import main
from lightning_hessian.records.answers import matrix
from lightning_hessian.records.files import save_record
from lightning_hessian.records.matrices import from_triangle
from lightning_hessian.records.metrics import METRICS
from lightning_hessian.report.contents import find_runs, gather, narrow, spread_out
from lightning_hessian.report.page import STATIC, import_map


class Page(HTMLParser):
    """The scripts, by id and by type, and every address, of a page."""

    def __init__(self, path):
        super().__init__()
        self.open, self.text, self.addresses = [], {}, []
        self.feed(path.read_text("utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.addresses += [found[name] for name in ("src", "href", "action", "data") if name in found]
        if tag not in ("meta", "link"):
            self.open.append(tag)
            self.at = found.get("id") or found.get("type") or tag

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style", "title"):
            self.text[self.at] = self.text.get(self.at, "") + data

    @property
    def catalog(self):
        return json.loads(self.text["catalog"])

    @property
    def answers(self):
        """The names of blocks by what they answer, by run."""
        return {blocks["run"]: blocks["answers"] for blocks in self.catalog["blocks"]}

    def arrays(self, name):
        return unpack(gzip.decompress(base64.b64decode(self.text[f"block-{name}"])))[0]

    def meta(self, name):
        return unpack(gzip.decompress(base64.b64decode(self.text[f"block-{name}"])))[1]


def named(blocks, kind):
    """The names of the blocks of one kind, by the rest of their keys."""
    return {key.partition("/")[2]: name for key, name in blocks.items() if key.startswith(f"{kind}/")}


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
    assert list(page.answers) == ["a", "b"]
    for run, blocks in page.answers.items():
        records = load_records(tmp_path / "logs" / run)
        series = page.arrays(blocks["series"])
        assert series["steps"].tolist() == [record.logged_step for record in records]
        for metric in METRICS:
            np.testing.assert_allclose(series[metric.name], [getattr(r, metric.name) for r in records], rtol=1e-6)
        ends = [record.residuals[..., 0] for record in records]
        np.testing.assert_allclose(series["lambda_max_error"], ends, rtol=1e-6)
        assert series["lambda_max_converged"].all()
        for sample in range(2):
            spectra = page.arrays(blocks[f"spectra/{sample}/0"])
            np.testing.assert_allclose(spectra["eigenvalues"], [r.eigenvalues[sample, 0] for r in records], rtol=1e-6)
            np.testing.assert_array_equal(spectra["converged"], [r.converged[sample, 0] for r in records])
            for record in records:
                which = f"{record.logged_step}/{sample}"
                np.testing.assert_array_equal(page.arrays(blocks[f"input/{which}"])["x"], record.x[sample])
                maps = page.arrays(blocks[f"maps/{which}/0"])
                for name in ("gradient", "diagonal", "diagonal_error", "eigenvectors"):
                    np.testing.assert_allclose(maps[name], getattr(record, name)[sample, 0], rtol=1e-6, atol=0)
                chosen = record.eigenvalues[sample, 0, record.vector_index[sample, 0]]
                np.testing.assert_allclose(maps["eigenvector_values"], chosen, rtol=1e-6)
                triangle = page.arrays(blocks[f"matrix/{which}/0"])["triangle"]
                np.testing.assert_allclose(triangle, record.hessian[sample, 0][np.triu_indices(4)], rtol=1e-6)


def test_the_page_answers_as_the_tab(tmp_path):
    """Every block is what the route of the same name answers, but for the times and for narrowed numbers."""
    records = [quadratic_record(3.0 + n, 1, -2, shape=(3,), num_samples=2, step=n, logged_step=n) for n in range(2)]
    write_run(tmp_path / "logs" / "run", records)
    page, tab = Page(write_report(tmp_path / "logs", tmp_path / "r.html")), Tab(tmp_path / "logs")
    names = {
        "series": [],
        "spectra": ["sample", "class_id"],
        "input": ["step", "sample"],
        "maps": ["step", "sample", "class_id"],
        "matrix": ["step", "sample", "class_id"],
    }
    seen = set()
    for key, name in page.answers["run"].items():
        kind, *values = key.split("/")
        seen.add(kind)
        which = dict(zip(names[kind], values, strict=True))
        arrays, meta = tab.arrays(f"/{kind}", run="run", tag="input_hessian", **which)
        assert page.meta(name) == meta
        assert set(page.arrays(name)) == set(arrays)
        for each, array in arrays.items():
            np.testing.assert_allclose(page.arrays(name)[each], array, rtol=1e-6, err_msg=f"{key} {each}")
    assert seen == set(names)
    (run,) = tab.get("/runs").json["runs"]
    (here,) = page.catalog["runs"]["runs"]
    assert {**here["tags"][0], "written": None} == {**run["tags"][0], "written": None}
    assert page.catalog["runs"]["metrics"] == tab.get("/runs").json["metrics"]


@pytest.mark.parametrize("activation", [nn.GELU, nn.ReLU])
def test_what_is_not_valid_has_no_matrix_in_the_page(activation, tmp_path):
    """The first sample, at the last of two steps; everything else is there."""
    records = train(activation, steps=2)
    for record in (records[0], invalidated(records[1], [[0, 0], [1, 1]])):
        save_record(record, tmp_path / "run")
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html"))
    (blocks,) = page.answers.values()
    samples = (0, 1) if activation is nn.ReLU else (0,)  # whose matrices are stored, or given by eigenvectors
    expected = {f"matrix/{step}/{n}/{k}" for step in (0, 9) for n in samples for k in (1, 3)}
    assert {key for key in blocks if key.startswith("matrix/")} == expected - {"matrix/9/0/1", "matrix/9/0/3"}
    series, meta = page.arrays(blocks["series"]), page.meta(blocks["series"])
    np.testing.assert_array_equal(series["valid"], [[[1, 1], [1, 1]], [[0, 0], [1, 1]]])
    np.testing.assert_allclose(series["trace_mean"][1], records[1].trace[1], rtol=1e-6)
    assert meta["message"][1] == MESSAGE
    assert "1 of 2 samples has no valid Hessian" in meta["validity"][1]
    assert MESSAGE in page.meta(blocks["maps/9/0/1"])["why_no_matrix"]


def test_what_is_the_same_is_there_once(page):
    names = [name for blocks in page.answers.values() for name in named(blocks, "input").values()]
    assert len(names) == 10
    assert len(set(names)) == 2  # samples


def test_the_list_of_runs(page):
    (first, _) = page.catalog["runs"]["runs"]
    (tag,) = first["tags"]
    assert tag["tag"] == "input_hessian"
    assert tag["steps"] == [0, 1, 2]
    assert (tag["num_samples"], tag["num_inputs"], tag["shape"]) == (2, 4, [2, 2])
    assert tag["left_out"] is None
    blocks = page.answers["a"]
    assert page.meta(blocks["series"])["method"] == ["dense"] * 3
    assert page.arrays(blocks["series"])["steps"].tolist() == [0, 1, 2]


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
    assert page.text["module"].split("\n")[1] == 'import { render } from "input_hessian/report.js";'
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


def test_what_does_not_fit_is_left_out_and_reported(tmp_path):
    """First matrices go, then maps, then measurements; the last one stays whole as long as it can."""
    generator = np.random.default_rng(0)
    for step in range(4):
        record = quadratic_record(*generator.normal(size=100), step=step, logged_step=step, num_samples=2)
        noise = generator.normal(size=record.hessian.shape)
        save_record(dataclasses.replace(record, hessian=noise + noise.swapaxes(-1, -2)), tmp_path / "run")
    runs = find_runs([tmp_path / "run"])
    ((everything,), store) = gather(runs, 10**9)
    assert everything.measured.left_out is None
    assert len(named(everything.blocks, "matrix")) == 8
    ((most,), part) = gather(runs, store.size - 80_000)
    matrices = named(most.blocks, "matrix")
    assert 2 <= len(matrices) < 8
    assert {key for key in matrices if key.startswith("3/")} == {"3/0/0", "3/1/0"}
    assert most.measured.left_out == f"Matrices: {len(matrices)} of 8 are on this page."
    ((few,), least) = gather(runs, 12_000)
    assert few.measured.summaries[-1].logged_step == 3
    num_shown = len(few.measured.summaries)
    assert few.measured.left_out.startswith(f"{num_shown} of 4 measurements are on this page. ")
    assert num_shown < 4
    assert set(named(few.blocks, "spectra")) == {"0/0", "1/0"}
    assert not named(few.blocks, "matrix")
    for some, limit in ((part, store.size - 80_000), (least, 12_000)):
        assert sum(map(len, some.blocks.values())) <= limit


def test_rows_of_a_matrix_that_is_drawn_smaller_are_in_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "MAX_CELLS", 3)
    record = quadratic_record(3.0, 1.0, -2.0, 0.1)
    save_record(record, tmp_path / "run")
    page = Page(write_report(tmp_path / "run", tmp_path / "r.html"))
    blocks = page.answers["run"]
    assert page.meta(blocks["matrix/0/0/0"])["num_cells"] == 2
    whole = from_triangle(page.arrays(blocks["whole/0/0/0"])["triangle"], 4)
    np.testing.assert_allclose(whole, record.matrix(0, 0), rtol=1e-6)


def test_the_page_is_no_larger_than_max_size(tmp_path):
    save_run(tmp_path / "run", 2)
    whole = write_report(tmp_path / "run", tmp_path / "r.html").stat().st_size
    smaller = write_report(tmp_path / "run", tmp_path / "r.html", max_size=(whole - 1000) / 1e6)
    assert smaller.stat().st_size <= whole - 1000
    assert "are on this page" in Page(smaller).text["catalog"]


def test_measurements_that_cannot_be_compared_are_reported(tmp_path):
    save_record(quadratic_record(1.0, 2.0, step=0, logged_step=0), tmp_path / "run")
    save_record(quadratic_record(1.0, 2.0, 3.0, step=1, logged_step=1), tmp_path / "run")
    (run,) = Page(write_report(tmp_path / "run", tmp_path / "r.html")).catalog["runs"]["runs"]
    assert run["tags"][0]["steps"] == [1]
    assert "1 measurement of other samples" in run["tags"][0]["left_out"]


def test_two_measurements_at_one_logged_step_are_reported(tmp_path):
    for step in range(2):  # before training and after the first step
        save_record(quadratic_record(1.0 + step, 2.0, step=step, logged_step=0), tmp_path / "run")
    (run,) = Page(write_report(tmp_path / "run", tmp_path / "r.html")).catalog["runs"]["runs"]
    assert run["tags"][0]["steps"] == [0]
    assert "1 measurement followed by a later one at the same logged step" in run["tags"][0]["left_out"]


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
        ([0.5, 2048.0, np.nan, np.inf], np.float32),
        ([0.1, 1e-30], np.float32),
        ([0.1, 1e-50], np.float64),
        ([0.1, 1e50], np.float64),
    ]:
        narrowed = narrow(np.array(values))
        assert narrowed.dtype == dtype
        np.testing.assert_allclose(narrowed, values, rtol=1e-6, atol=0)


def test_eigenvectors_give_the_matrix_where_no_eigenvalue_is_without_one(tmp_path):
    record = dataclasses.replace(quadratic_record(3.0, 1.0, -2.0, 0.0), hessian=None)
    few = {"eigenvectors": record.eigenvectors[..., :2, :], "vector_index": record.vector_index[..., :2]}
    for run, each in (
        ("whole", record),
        ("few", dataclasses.replace(record, **few)),
        ("ends", dataclasses.replace(record, complete=False)),
    ):
        save_record(each, tmp_path / run)
        page = Page(write_report(tmp_path / run, tmp_path / "r.html"))
        blocks, has_matrix = page.answers[run], run == "whole"
        assert page.meta(blocks["maps/0/0/0"])["matrix"] == ("from eigenvectors" if has_matrix else "none")
        assert ("matrix/0/0/0" in blocks) == has_matrix
        if has_matrix:
            found = from_triangle(page.arrays(blocks["matrix/0/0/0"])["triangle"], 4)
            np.testing.assert_allclose(found, record.matrix(0, 0), rtol=1e-6)


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
    assert Page(output).catalog["title"] == "Input Hessian: run"
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
    message = capsys.readouterr().err
    assert re.match(f"lightning-hessian: .*{sentence}", message)
    assert message.count("\n") == 1
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
