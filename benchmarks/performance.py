"""``docs/performance.md`` from the files in ``results/``: nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS

PAGE = Path(__file__).parents[1] / "docs" / "performance.md"
MISS = "**missed**"


def main() -> None:
    """Writes the page."""
    PAGE.write_text(page({path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}))


def page(results: dict[str, dict[str, Any]]) -> str:
    """The text of the page, with a section for every benchmark that has results.

    Args:
        results: the files, by name.
    """
    sections = [
        f"{text(results[name])}\n\n{_made_on(results[name]['environment'])}"
        for name, text in SECTIONS.items()
        if name in results
    ]
    return "\n\n".join((HEAD, *sections)) + "\n"


HEAD = """# Performance

What a measurement costs, compared with goals that were set beforehand. Missed goals are marked, with what limits
them.

In comparisons, this package and its peer are called alternately in one process, after checking that their results
agree. A **gradient**, as a unit of cost, is one forward and backward pass of the same batch for one class; an
**HVP** is a Hessian-vector product. This page is generated from `benchmarks/results/` (`make bench`, `python -m
benchmarks gpu FOLDER`)."""


def _made_on(environment: dict[str, Any]) -> str:
    machine = environment.get("gpu") or f"{environment['cpu']}, {environment['cores']} cores"
    threads = "" if "gpu" in environment else f", {environment['threads']} threads"
    return f"*{machine}{threads}, torch {environment['torch']}, {environment['date'][:10]}.*"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def _at_least(row: dict[str, Any]) -> str:
    return "" if row["median"] >= row["wanted_at_least"] else MISS


def _times(rows: Iterable[dict[str, Any]]) -> str:
    """Of ratios of two times, as ``common.compare`` gives them."""
    head = ("ours", "compared with", "goal: speedup", "median", "worst", "seconds, ours and theirs", "")
    return table(
        head,
        (
            (
                row["ours"],
                row["against"],
                f"≥ {row['wanted_at_least']:,}",
                f"{row['median']:,.3g}",
                f"{row['worst']:,.3g}",
                f"{row['seconds_ours']:.3g}, {row['seconds_peer']:.3g}",
                _at_least(row),
            )
            for row in rows
        ),
    )


PRICE_LIMITS = """Why goals are missed: of 12 to 13 gradients in a later measurement of the residual ReLU network,
the gradients of its ten outputs and their QR decomposition take 7, the target's gradient and finding that the network
is piecewise linear at these weights take 2, and the comparison of one sample with values, in float64, takes 2. With two
samples, as for ResNet-50, both checks look at half of all samples. Three quarters of the ViT's time are 63 HVPs, which
cost 1.7 gradients each, because a gradient can use fused attention, which has no second derivative. The forum CNN needs
100 HVPs to find ten eigenvalues to 1e-5 at each of eight samples; its first measurement also shortens the step five
times at samples close to kinks of max-pooling, and looks at derivatives beside them and for other causes."""


def price(result: dict[str, Any]) -> str:
    """Whole measurements, in forward passes and gradients."""
    rows = []
    for row in result["rows"]:
        if "left_out" in row:
            rows.append((row["case"], "", "", row["left_out"], "", "", "", ""))
            continue
        for when in ("first", "later"):
            found = row[when]
            rows.append(
                (
                    f"{row['case']}, N = {row['num_samples']}, `{row['target']}`",
                    f"`{row['method']}`",
                    when,
                    f"{found['forwards_per_sample']:g}",
                    f"≤ {found['wanted_forwards']}",
                    f"{found['gradients']:g}",
                    f"≤ {found['wanted_gradients']}",
                    "" if found["reached"] else MISS,
                )
            )
    head = ("network", "method", "measurement", "forward passes per sample", "goal", "gradients", "goal", "")
    return (
        "## What a measurement costs\n\nWhole measurements in a run, including checks, without heatmaps. Forward "
        "passes are counted per sample, and those in float64 count twice.\n\n"
        f"{table(head, rows)}\n\n{PRICE_LIMITS}"
    )


def scale(result: dict[str, Any]) -> str:
    """Networks of the usual size."""
    rows = [
        (
            row["case"],
            f"`{row['method']}`",
            row["num_matvecs"],
            row["seconds"],
            row["gradients"],
            f"{row['peak_gib']} ({row['peak_gib_of_a_gradient']})",
            f"≤ {row['wanted_gib']:g}",
            "" if row["peak_gib"] <= row["wanted_gib"] else MISS,
        )
        for row in result["rows"]
    ]
    head = ("network", "method", "HVPs", "seconds", "cost in gradients", "peak memory, GiB", "goal", "")
    return (
        "## ResNet-50 and ViT-B/16\n\n`input_spectrum` with its defaults on 3×224×224 (D = 150,528). The networks "
        "are built from transformers' configurations with random weights. Each is measured in its own process; the "
        f"resident memory after a single gradient is in parentheses.\n\n{table(head, rows)}"
    )


DEMO_LIMITS = """Why goals are missed: with GELU, a measurement computes 784 columns for 4 samples and 2 classes. A
column takes 0.97 of a gradient (in a batch of 256 images, which is as fast as gradients get), and one forward
tangent with two backward tangents cannot take less than 0.75; 58 % of this is spent in convolutions. The goal of a
third of the fit is therefore out of reach as long as the whole matrices of all four samples are computed.
Decomposing them takes another 0.7 s, checking them 0.05 s. In the difference of the two fits, each picture takes a
quarter of a second in matplotlib, mostly for text, and 0.06 s to compress."""


def demo(result: dict[str, Any]) -> str:
    """The share of the demo's time that goes to measuring."""
    rows = [
        (
            row["activation"],
            row["heatmap_samples"],
            f"`{row['method']}`",
            ", ".join(f"{seconds:g}" for seconds in row["measurements"]),
            f"{row['fit_seconds']:g}, {row['fit_seconds_without']:g}",
            f"{row['share']:.1%}",
            f"{row['share_by_difference']:.1%}",
            f"≤ {row['wanted_at_most']:.0%}",
            "" if row["share"] <= row["wanted_at_most"] else MISS,
        )
        for row in result["rows"]
    ]
    head = (
        "activation",
        "`heatmap_samples`",
        "method",
        "seconds of each measurement",
        "seconds of the fit, with and without",
    )
    return (
        "## The demo\n\n`examples/mnist_cnn.py`: 4 samples, 2 classes, D = 784, measured five times in four epochs. "
        "The share of the fit is given by the seconds that measurements report, and by the difference between the "
        "fits with and without the monitor. The difference also contains background work: importing matplotlib, and "
        "drawing and compressing pictures in a thread.\n\n"
        f"{table((*head, 'share, as reported', 'share, by difference', 'goal', ''), rows)}\n\n{DEMO_LIMITS}"
    )


LOW_RANK_LIMITS = """What limits `input_spectrum`: the exact answer takes a quarter of its time, and finding that the
network is piecewise linear (at the samples, in float64 at one of them, and at other inputs) takes a third; the rest
is the comparison with values, isolation and preparation."""


def low_rank(result: dict[str, Any]) -> str:
    """Complete spectra of ReLU networks."""
    return (
        "## Complete spectra of a residual ReLU network\n\nAll 3,072 eigenvalues for 3×32×32 inputs, `prob`, 4 samples "
        f"× 3 classes; the peer ran once.\n\n{_times(result['rows'])}\n\n{LOW_RANK_LIMITS}"
    )


def lanczos(result: dict[str, Any]) -> str:
    """Ends of spectra."""
    one = result["one iteration against one gradient"]
    rows = [
        (name, f"≤ {row['wanted_at_most']:g}", row["median"], row["worst"], _at_most(row)) for name, row in one.items()
    ]
    gradients = table(("cost in gradients of the same batch", "goal", "median", "worst", ""), rows)
    return (
        "## Ends of the spectrum\n\nThe 10 eigenvalues of largest magnitude of each of 24 Hessians of a small ViT, "
        "D = 3072.\n\n"
        f"{_times(result['rows'])}\n\n{gradients}"
    )


def _at_most(row: dict[str, Any]) -> str:
    return "" if row["median"] <= row["wanted_at_most"] else MISS


DENSE_LIMITS = """Why goals are missed: isolating a model, running one forward pass to count its memory, and
restoring everything take 2 to 3 ms, and the comparison with values in float64 takes another 2 to 4 ms, however small
the network is. For less than about 20 ms of work, that is more than a fifth, unless the network has so many small
operations (GRU, attention) that reverse mode saves more than that. On the MLP, whose columns take as long as the
peer's, symmetrizing and comparing the matrices reads each one a dozen times: a quarter of the time at K = 10, where
writing them is most of the work. For 20,000 points with D = 2, evaluating five values at each point in float64 costs
more than both columns of its Hessian."""


def dense(result: dict[str, Any]) -> str:
    """Whole Hessians under both allocators."""
    rows = []
    for name, found in result.items():
        if not isinstance(found, dict) or "summary" not in found:
            continue
        for work, row in found["summary"].items():
            missed = MISS if row["lowest_median"] < row["wanted_at_least"] else ""
            rows.append(
                (
                    f"`{work}`",
                    name,
                    row["cases"],
                    row["geometric_mean"],
                    f"{row['lowest_median']} (≥ {row['wanted_at_least']})",
                    row["worst_round"],
                    missed,
                )
            )
    head = ("ours", "allocator", "cases", "geometric mean", "lowest median (goal)", "worst round", "")
    cases = [
        (
            row["network"],
            row["N"],
            row["K"],
            name,
            *(f"{row[work]['ratio']:g}" if work in row else "" for work in found["summary"]),
        )
        for name, found in result.items()
        if isinstance(found, dict) and "rows" in found
        for row in found["rows"]
    ]
    works = next(
        (list(found["summary"]) for found in result.values() if isinstance(found, dict) and "summary" in found), []
    )
    every = table(("network", "N", "K", "allocator", *works), cases)
    return (
        "## Whole Hessians\n\nSpeed relative to `vmap(torch.func.hessian)` (2 means twice as fast), K outputs in one "
        'call. "Pages kept" means that `MALLOC_MMAP_THRESHOLD_` and `MALLOC_TRIM_THRESHOLD_` are large, so freed '
        "memory stays with the process. The goal for the geometric mean is 1. There are fewer cases for large "
        "networks, where one call of the peer takes seconds."
        f"\n\n{table(head, rows)}\n\n{DENSE_LIMITS}\n\n<details><summary>Every case</summary>\n\n{every}\n\n</details>"
    )


def statistics(result: dict[str, Any]) -> str:
    """How often standard errors hold."""
    rows = []
    for group, found in result.items():
        if group == "environment":
            continue
        nominal = [f"{share:.1%}" for share in found["nominal"]]
        for name, cases in found.items():
            if isinstance(cases, dict):
                shares = list(zip(*cases.values(), strict=True))
                ranges = [f"{min(s):.1%}–{max(s):.1%}" for s in shares]
                rows.append((group, name.replace("_", " "), found["seeds"], *ranges, ", ".join(nominal)))
    head = ("problems", "quantity", "seeds", "within 1", "within 2", "within 3", "expected (Student's t)")
    return (
        "## Do the standard errors hold?\n\nHow often the true value, known from whole matrices, lies within 1, 2 and "
        "3 standard errors of the estimate. Ranges are over problems. An exact value is always "
        "within.\n\n"
        f"{table(head, rows)}"
    )


def gpu(result: dict[str, Any]) -> str:
    """What was checked and timed on a GPU."""
    rows = []
    for group, works in result.items():
        if group == "environment":
            continue
        for name, row in works.items():
            if "left_out" in row or "failed" in row:
                verdict, detail = MISS, row.get("failed", row.get("left_out"))
            else:
                verdict = {True: "holds", False: MISS, None: ""}[row.get("ok")]
                detail = _detail(row)
            rows.append((group, name, verdict, str(detail).replace("|", "\\|").replace("\n", " ")[:300]))
    return f"## On a GPU\n\n{table(('', 'work', '', 'measured'), rows)}"


def _detail(row: dict[str, Any]) -> str:
    """The numbers of a row in short."""
    if "errors" in row:
        return f"largest error {max(row['errors'].values()):.1e}"
    if "rows" in row and row["rows"] and "ours" in row["rows"][0]:
        return "; ".join(f"{each['ours']}: {each['median']:g} times {each['against']}" for each in row["rows"])
    if "rows" in row:
        return "; ".join(
            f"D = {each['D']} × {each['matrices']}: {each['device']:.2g} s, CPU {each['cpu']:.2g} s"
            for each in row["rows"]
        )
    if "first" in row:
        return "; ".join(f"{when}: {row[when]['gradients']:g} gradients" for when in ("first", "later"))
    return ", ".join(f"{key} {value}" for key, value in row.items() if key not in ("ok", "took", "warnings"))


SECTIONS = {
    "price": price,
    "scale": scale,
    "demo": demo,
    "dense": dense,
    "low_rank": low_rank,
    "lanczos": lanczos,
    "statistics": statistics,
    "gpu": gpu,
}

if __name__ == "__main__":
    main()
