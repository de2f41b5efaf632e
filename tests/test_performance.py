"""The page on performance is what its results say, misses included."""

import json
from pathlib import Path

import pytest

from benchmarks.performance import MISS, page

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
ENVIRONMENT = {"cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2.13", "date": "2026-11-27T03:21:22+00:00"}


def of_price(gradients: float) -> dict:
    row = {"forwards_per_sample": 6.5, "wanted_forwards": 8, "gradients": gradients, "wanted_gradients": 10}
    row["reached"] = gradients <= 10
    case = {"case": "ViT", "num_samples": 4, "target": "logit", "method": "lanczos", "first": row, "later": row}
    return {"environment": ENVIRONMENT, "rows": [case]}


def test_misses_are_marked() -> None:
    assert MISS not in page({"price": of_price(9.5)})
    missed = page({"price": of_price(12)})
    assert missed.count(MISS) == 2
    assert "| ViT, N = 4, `logit` | `lanczos` | later | 6.5 | ≤ 8 | 12 | ≤ 10 | **missed** |" in missed


def test_failures_on_a_gpu_are_shown() -> None:
    works = {
        "dense": {"ok": True, "errors": {"MLP": 3e-7}},
        "fit": {"failed": "RuntimeError: no"},
        "sums": {"ok": False},
    }
    shown = page({"gpu": {"environment": {**ENVIRONMENT, "gpu": "H100"}, "truth": works}})
    assert "| truth | dense | holds | largest error 3.0e-07 |" in shown
    assert shown.count(MISS) == 2
    assert "*H100, torch 2.13, 2026-11-27.*" in shown


@pytest.mark.parametrize("name", ["low_rank", "lanczos", "statistics"])
def test_committed_results_can_be_shown(name: str) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text())
    assert result["environment"]["date"][:10] in page({name: result})
