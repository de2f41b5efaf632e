"""Which lines a mutant changes, and the page of results."""

import json

import pytest
from support.mutants import PAGE, RESULTS, page
from support.tests_by_line import statement_lines

SOURCE = """\
@decorated(
    1,
)
def f(x, y=2):
    total = (
        x
        + y
    )
    if x:
        return total
    try:
        return g(x)
    except ValueError:
        return 0
"""


@pytest.mark.parametrize(
    ("changed", "lines"),
    [
        ([2], {1, 2, 3, 4}),  # a decorator belongs to the head of its function
        ([4], {1, 2, 3, 4}),
        ([7], {5, 6, 7, 8}),
        ([9], {9}),
        ([10, 12], {10, 12}),
        ([13], {13}),
    ],
)
def test_all_lines_of_a_changed_statement_count(changed: list[int], lines: set[int]) -> None:
    assert statement_lines(SOURCE, changed) == lines


def test_the_page_is_current() -> None:
    results = json.loads(RESULTS.read_text())
    assert PAGE.read_text() == page(results)
    for each in results:
        assert each["noticed_at_once"] + each["noticed_since"] == len(each["killed"])
        assert len(each["killed"]) + len(each["survivors"]) == each["run"] <= each["drawn"]
