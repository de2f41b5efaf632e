"""The judge of ``make zoo`` tells right from wrong, and needs no derivative for it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.networks import custom_function
from torch import Tensor

from benchmarks.common import RESULTS
from benchmarks.gpu.suite import SIZES, Suite
from benchmarks.zoo import judge as judging
from benchmarks.zoo.__main__ import without
from benchmarks.zoo.judge import Case, judge, truth_of
from benchmarks.zoo.page import summary
from benchmarks.zoo.sources import case_of
from lightning_hessian import input_spectrum

F64 = torch.float64
WAYS = ("spectrum 3 float64", "hessian 1 float64", "lanczos 3 float64", "hessian 3 float32")


def case(function: Callable[[Tensor], Tensor]) -> Case:
    x = torch.randn(3, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    return Case("case", lambda x: torch.stack([function(x), (x * x).sum(1)], dim=1), x)


def smooth(x: Tensor) -> Tensor:
    return x.sin().prod(dim=1) + x.pow(3).sum(dim=1)


lying = custom_function(lambda x: x**3, lambda x: 3.3 * x**2)


def test_the_truth_comes_from_values() -> None:
    truth = truth_of(case(lambda x: lying(x).sum(1)))
    x = case(smooth).x
    assert truth.kind == ["smooth"] * 3
    torch.testing.assert_close(truth.hessian[:, 0], torch.diag_embed(6 * x), atol=1e-7, rtol=0)
    torch.testing.assert_close(truth.gradient[:, 0], 3 * x**2, atol=1e-9, rtol=0)


def test_noise_of_float32_is_no_obstacle() -> None:
    truth = truth_of(case(lambda x: smooth(x.float()).double()))
    assert truth.kind == ["smooth"] * 3
    exact = truth_of(case(smooth))
    away = (truth.hessian - exact.hessian).abs().amax((2, 3))
    assert (away <= 2 * (truth.hessian_blur + exact.hessian_blur)).all()


def test_stairs_are_rough() -> None:
    assert truth_of(case(lambda x: x.round(decimals=3).sum(1))).kind == ["rough"] * 3


@pytest.mark.parametrize("how", WAYS)
def test_what_is_right_is_called_right(how: str) -> None:
    known = case(smooth)
    assert judge(known, truth_of(known), how).verdict == "right"


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_is_found_out_is_called_caught(how: str) -> None:
    known = case(lambda x: lying(x).sum(1))
    assert judge(known, truth_of(known), how).verdict == "caught"


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (lambda s: replace(s, eigenvalues=s.eigenvalues * 1.05), "wrong"),
        (lambda s: replace(s, gradient=s.gradient * 1.05), "wrong"),
        (lambda s: replace(s, valid=torch.zeros_like(s.valid)), "alarmed"),
        (lambda s: replace(s, eigenvalues=s.eigenvalues * 1.05, valid=torch.zeros_like(s.valid)), "caught"),
    ],
)
def test_what_the_package_says_is_not_believed(
    change: Callable[[Any], Any], verdict: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judging, "input_spectrum", lambda *args, **more: change(input_spectrum(*args, **more)))
    known = case(smooth)
    assert judge(known, truth_of(known), "spectrum 3 float64").verdict == verdict


def test_exceptions_are_crashes_unless_they_are_ours() -> None:
    def broken(x: Tensor) -> Tensor:
        if x.requires_grad:
            raise KeyError("gradients")
        return smooth(x)

    assert judge(case(broken), truth_of(case(smooth)), WAYS[0]).verdict == "crashed"
    infinite = case(lambda x: x.sum(1) / 0)
    assert judge(infinite, truth_of(infinite), WAYS[0]).verdict == "refused"


def test_a_case_varies_some_entries_of_the_first_tensor() -> None:
    x = torch.randn(5, 5, dtype=F64)
    made = case_of("mm/0", torch.mm, (x, x.T), {})
    assert made is not None
    assert made.x.shape == (3, 8)
    torch.testing.assert_close(made.model.one(made.x[0]), x @ x.T)
    assert case_of("argmax/0", torch.argmax, (x,), {}) is None
    counts = summary([{"key": "op_db.mm/0", "verdict": "right"}, {"key": "op_db.mm/0", "verdict": "right"}])
    assert counts["counts"] == {"op_db": {"right": 2}}
    assert counts["cases"] == {"op_db": 1}


def test_what_came_out_wrong_is_judged_again() -> None:
    lines = [
        {"commit": "a"},
        *({"begin": "cos"}, {"key": "cos/0", "verdict": "right"}, {"end": "cos"}),
        *({"begin": "sin"}, {"key": "sin/0", "verdict": "right"}, {"key": "sin/1", "verdict": "crashed"}),
        *({"end": "sin"}, {"commit": "b"}, {"begin": "tan"}, {"end": "tan"}),
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    kept = [json.loads(line) for line in without(["crashed", "wrong"], text).splitlines()]
    assert kept == [*lines[:4], *lines[8:]]
    assert without([], text) == text
    died = [{"begin": "cot"}, {"commit": "c"}, {"begin": "cot"}, {"commit": "d"}]
    died += [{"key": "cot", "verdict": "crashed", "end": "cot"}]  # after it died twice
    text = "".join(json.dumps(line) + "\n" for line in died)
    assert without(["crashed"], text) == '{"commit": "c"}\n'


def test_results_name_no_path_of_a_machine() -> None:
    for path in RESULTS.glob("*.json"):
        assert not re.search(r"[ '\"]/\w+/", path.read_text()), path


def test_a_jump_beside_a_sample_and_a_pole_are_decided_by_short_steps() -> None:
    """Long steps cross the jump at 3 and come near the pole there; short ones do not."""
    x = torch.full((3, 4), 2.9, dtype=F64)
    known = Case("case", lambda x: torch.stack([x.floor().sum(1), (1 / (x - 3)).sum(1)], dim=1), x)
    truth = truth_of(known)
    assert truth.kind == ["smooth"] * 3
    torch.testing.assert_close(truth.hessian[0, 1].diagonal(), torch.full((4,), -2000.0, dtype=F64), rtol=1e-3, atol=0)
    assert not truth.gradient[:, 0].any()


def test_a_failure_on_a_gpu_is_a_result(tmp_path: Any) -> None:
    suite = Suite(torch.device("cpu"), SIZES["cpu"], tmp_path / "gpu.json")
    suite.run("truth", "broken", lambda: 1 / 0)
    suite.run("truth", "sum", lambda: {"ok": True})
    assert suite.results["truth"]["broken"]["failed"] == "ZeroDivisionError: division by zero"
    assert '"ok": true' in (tmp_path / "gpu.json").read_text()
