"""What ``make docs`` adds to the pages in this folder: MkDocs calls these functions (``hooks`` in mkdocs.yml).

Pages of metrics, examples and messages are made from the code, so that they cannot fall behind it.
"""

from __future__ import annotations

import ast
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_hessian.records.metrics import METRICS, Metric

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lightning_hessian"
SENTENCE = re.compile(r"\S+( \S+){3,}", re.DOTALL)
ERRORS = ("ConfigurationError", "MeasurementError", "TimeLimitError", "WritingError", "Finding")
SPEAKERS = (*ERRORS, "TypeError", "ValueError", "IndexError", "warn", "_warn", "inform", "rank_zero_warn")
TOPICS = {  # of messages, by where they come from; the first that fits
    "training/sample_files": "Checkpoints and the command",
    "training/samples": "Samples and batches",
    "training/sample_finder": "Samples and batches",
    "training/batch": "Samples and batches",
    "training/checkpoints": "Checkpoints and the command",
    "offline": "Checkpoints and the command",
    "training/distributed": "Several processes",
    "training/trainer_access": "The Trainer",
    "training/trainer_run": "The Trainer",
    "training/resume": "Resuming",
    "training": "Settings of a run",
    "recorder": "Settings of a run",
    "errors": "Settings of a run",
    "curvature/checks": "What the checks find",
    "curvature/analysis": "What the checks find",
    "curvature": "Memory, time and methods",
    "model": "Model, input and classes",
    "operator": "Operators",
    "linear_operators": "Operators",
    "records": "Records, plots and reports",
    "report": "Records, plots and reports",
    "writers": "Records, plots and reports",
}


def on_config(config: Any) -> Any:
    """Adds the pages of metrics and examples to the navigation."""
    for section in config.nav:
        if "Metrics" in section:
            section["Metrics"] += [{metric.title: f"metrics/{metric.name}.md"} for metric in shown_metrics()]
        if "Examples" in section:
            section["Examples"] += [{_title(path): f"examples/{path.stem}.md"} for path in examples()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages that are made from the code."""
    from mkdocs.structure.files import File

    pages = {f"metrics/{metric.name}.md": metric_page(metric) for metric in shown_metrics()}
    pages |= {f"examples/{path.stem}.md": example_page(path) for path in examples()}
    pages["examples/index.md"] = _examples_index()
    pages["messages.md"] = messages_page()
    for name in ("CONTRIBUTING", "CHANGELOG"):
        pages[f"{name.lower()}.md"] = (ROOT / f"{name}.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for uri, content in pages.items():
        files.append(File.generated(config, uri, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Points links that leave this folder, which work on GitHub, at pages of the site."""
    up = "../" * page.file.src_uri.count("/")
    markdown = re.sub(r"\]\((?:\.\./)+examples/(\w+)\.(?:py|ipynb)\)", rf"]({up}examples/\1.md)", markdown)
    markdown = re.sub(r"\]\((?:\.\./)+(CONTRIBUTING|CHANGELOG)\.md", lambda m: f"]({up}{m[1].lower()}.md", markdown)
    if page.file.src_uri == "metrics.md":
        for metric in shown_metrics():
            title = metric.title.replace("|", "\\|")
            markdown = markdown.replace(f"\n| {title} | ", f"\n| [{title}](metrics/{metric.name}.md) | ")
    return markdown


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML, which browsers draw by themselves."""
    from latex2mathml.converter import convert

    def mathml(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]), display=display)

    return re.sub(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', mathml, content, flags=re.DOTALL)


def shown_metrics() -> list[Metric]:
    """Those with a page of their own: all but standard errors."""
    return [metric for metric in METRICS if not metric.is_error]


def metric_page(metric: Metric) -> str:
    """Formula, unit, meaning and names from the table; how to read it from ``metric_notes.md``."""
    names = [f"`record.{metric.name}`, `[samples, classes]`"]
    if not metric.is_comparison:
        names.append(f"`spectrum.{metric.name}`, `[samples, classes]`, from `input_spectrum`")
    if metric.is_logged:
        names.append(f"`hessian_{metric.name}/…` in TensorBoard and other loggers: the mean over samples")
    if metric.has_error:
        names.append(f"`record.{metric.name}_error`: its standard error, 0 where it is exact")
    listed = "\n".join(f"- {name}" for name in names)
    return f"""# {metric.title[0].upper()}{metric.title[1:]}

<p class="formula">{html.escape(metric.formula)}</p>

{metric.meaning[0].upper()}{metric.meaning[1:]}.

**Unit:** {metric.unit or "none"}.

{listed}

![{metric.title} over training, and at one digit](../images/metrics/{metric.name}.png){{ width="600" }}

{metric_notes()[metric.name]}

The [table of metrics](../metrics.md) explains the symbols.
"""


def metric_notes() -> dict[str, str]:
    """The sections of ``metric_notes.md`` by name."""
    text = (ROOT / "docs" / "metric_notes.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    return {name: body.strip() for name, body in (section.split("\n", 1) for section in sections)}


def examples() -> list[Path]:
    """The programs and notebooks in ``examples/``."""
    return sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb"))


def example_page(path: Path) -> str:
    """What an example says about itself, its code, and the YAML file beside it where there is one."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return _notebook_page(path)
    page = f'# {_title(path)}\n\n{example_docstring(path)}\n\n```python title="examples/{path.name}"\n{text}```\n'
    settings = path.with_suffix(".yaml")
    if settings.exists():
        page += f'\n```yaml title="examples/{settings.name}"\n{settings.read_text(encoding="utf-8")}```\n'
    return page


def example_docstring(path: Path) -> str:
    """What a program says about itself, or what a notebook says below its title."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        return "".join(json.loads(text)["cells"][0]["source"]).split("\n\n", 1)[1]
    return ast.get_docstring(ast.parse(text)) or ""


def _notebook_page(path: Path) -> str:
    """Its cells, one after another."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = [
        "".join(cell["source"]) if cell["cell_type"] == "markdown" else f"```python\n{''.join(cell['source'])}\n```"
        for cell in cells
    ]
    return "\n\n".join([*parts, f"*From `examples/{path.name}`.*"]) + "\n"


def messages() -> Iterator[tuple[str, str]]:
    """Every sentence that the package can say, with the topic that it belongs to; ``…`` stands for what varies."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).with_suffix("").as_posix()
        topic = next((topic for start, topic in TOPICS.items() if name.startswith(start)), None)
        if topic is not None and name != "records/metrics":
            yield from ((topic, sentence) for sentence in _sentences(ast.parse(path.read_text(encoding="utf-8"))))


def messages_page() -> str:
    """All of them, by topic."""
    by_topic: dict[str, list[str]] = {topic: [] for topic in TOPICS.values()}
    for topic, sentence in messages():
        if sentence not in by_topic[topic]:
            by_topic[topic].append(sentence)
    listed = "\n\n".join(
        f"## {topic}\n\n" + "\n".join(f"- {html.escape(sentence, quote=False)}" for sentence in sentences)
        for topic, sentences in by_topic.items()
    )
    return f"""# All messages

Every sentence in errors, warnings and diagnoses of the package, collected from its code when this page was
built; `…` marks what is filled in. Search for a few words of your message.
[Troubleshooting](troubleshooting.md) explains the common ones.

{listed}
"""


def _sentences(tree: ast.AST) -> Iterator[str]:
    """The sentences among a module's strings: what is raised or warned of, and what is kept or returned for it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _called(node) in SPEAKERS and node.args:
            yield from _long_ones(node.args[0])
        elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.Return)) and node.value is not None:
            for text in _long_ones(node.value):
                starts_well = text[0].isupper() or text[0] == "…" or ". " in text
                if starts_well and text.rstrip("…").endswith((".", "?")):
                    yield text


def _long_ones(node: ast.AST) -> Iterator[str]:
    if isinstance(node, (ast.Constant, ast.JoinedStr)):
        if SENTENCE.match(text := _text(node)):
            yield text
    elif isinstance(node, (ast.Dict, ast.Tuple, ast.List, ast.IfExp, ast.BoolOp, ast.BinOp)):
        for child in ast.iter_child_nodes(node):
            yield from _long_ones(child)


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return re.sub(r"\{\w*\}", "…", node.value) if isinstance(node.value, str) else ""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(value) if isinstance(value, ast.Constant) else "…" for value in node.values)
    return ""


def _called(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


def _title(path: Path) -> str:
    return path.stem.replace("_", " ").capitalize()


def _examples_index() -> str:
    rows = []
    for path in examples():
        rows.append(f"- [{_title(path)}]({path.stem}.md): {example_docstring(path).splitlines()[0]}")
    listed = "\n".join(rows)
    return f"""# Examples

Each example is one file in `examples/` that runs offline on a CPU; the tests run all of them. Start one with
`.venv/bin/python examples/mnist_cnn.py`, after `make demo` has created `.venv`. The [gallery](../gallery.md)
shows a picture of each.

{listed}
"""
