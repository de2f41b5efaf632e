"""``docs/zoo.md`` and ``benchmarks/results/zoo.json``, from what was judged."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.zoo.explanations import EXPLANATIONS
from benchmarks.zoo.judge import VERDICTS

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
LONGEST = 160  # characters of a message in the results
SHOWN = ("wrong", "crashed", "alarmed", "refused", "caught", "undecidable")


def summary(judgements: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by source and verdict, and what was not right, once per case and verdict."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    exceptions: dict[tuple[str, str], dict[str, Any]] = {}
    cases = defaultdict(set)
    for each in judgements:
        source = each["key"].split(".")[0]
        counts[source][each["verdict"]] += 1
        cases[source].add(each["key"])
        if each["verdict"] != "right":
            entry = exceptions.setdefault(
                (each["key"], each["verdict"]),
                {"case": each["key"], "verdict": each["verdict"], "how": [], "message": each["message"][:LONGEST]},
            )
            entry["how"].append(each["how"])
    ordered = sorted(exceptions.values(), key=lambda e: (VERDICTS.index(e["verdict"]), e["case"]))
    return {
        "cases": {source: len(found) for source, found in cases.items()},
        "counts": {source: {v: found[v] for v in VERDICTS if found[v]} for source, found in counts.items()},
        "exceptions": ordered,
    }


def explained(case: str, verdict: str) -> str:
    """The first explanation whose pattern fits a case, or nothing."""
    fits = (
        text for pattern, verdicts, text in EXPLANATIONS if verdict in verdicts.split() and fnmatchcase(case, pattern)
    )
    return next(fits, "")


def write(result: dict[str, Any]) -> None:
    """Both files."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "zoo.json").write_text(json.dumps(result, indent=0, ensure_ascii=False) + "\n")
    PAGE.write_text(page(result))


def page(result: dict[str, Any]) -> str:
    """The text of the page."""
    rows = []
    for source, counts in result["counts"].items():
        numbers = " | ".join(str(counts.get(v, 0)) for v in reversed(VERDICTS))
        judged = " of ".join(map(str, result["judged"][source]))
        rows.append(f"| `{source}` | {judged} | {result['cases'][source]} | {numbers} |")
    environment = result["environment"]
    commits = ", ".join(f"`{c}`" for c in result["commits"])
    sections = [section(verdict, result["exceptions"]) for verdict in SHOWN]
    return f"""# Zoo

How often are the numbers right, and does the package notice when they are not? `make zoo` measures every operation and
layer in PyTorch's own test suite (`op_db` and `module_db` of `torch.testing._internal`), and the models of transformers
that can be built from a small configuration. Each is a function of a few entries of its first floating-point input,
measured at one sample and at three, in float64 and partly in float32. Gradients and Hessians are compared with central
differences of float64 values, which are computed independently of the package with up to five triples of step sizes.
This page is generated from `benchmarks/results/zoo.json` (torch {environment["torch"]}, {environment["date"][:10]},
commits {commits}; "dirty" marks uncommitted changes).

| | examined | cases | {" | ".join(reversed(VERDICTS))} |
|---|---|---|{"---|" * len(VERDICTS)}
{chr(10).join(rows)}

"Examined" counts operations, layers and model types. A type that cannot be built small, or that needs more than one
input, has no case. Every case is measured in three ways, and each outcome is counted as one of the following.

- **right**: reported as valid, and equal to the differences within 1 % (3 % in float32) of the largest entry.
- **undecidable**: the differences do not converge as the step shrinks (a kink, a jump, the border of a domain).
- **caught**: reported as not valid, correctly: the result is wrong, random or not finite.
- **refused**: an error explains why nothing can be measured.
- **alarmed**: reported as not valid, although the result is right (a false alarm).
- **crashed**: any other exception, or the process died.
- **wrong**: reported as valid, but different from the differences.

{chr(10).join(filter(None, sections))}"""


def section(verdict: str, exceptions: list[dict[str, Any]]) -> str:
    """The cases of one verdict, those with the same explanation together."""
    by_text: dict[str, list[str]] = defaultdict(list)
    for entry in exceptions:
        if entry["verdict"] == verdict:
            by_text[explained(entry["case"], verdict)].append(entry["case"])
    if not by_text:
        return ""
    lines = [
        f"| {', '.join(f'`{c}`' for c in cases)} | {text or '**not explained**'} |" for text, cases in by_text.items()
    ]
    return f"## {verdict.capitalize()}\n\n| case | explanation |\n|---|---|\n" + "\n".join(lines) + "\n"
