"""Outputs of a regression are not called classes, in the tab as in the report."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from support.make_run import train, write_run
from torch import nn


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose samples have no labels, and whose target does not compare outputs."""
    folder = tmp_path_factory.mktemp("regression")
    records = [replace(record, labels=None) for record in train(nn.GELU, target="logit")]
    assert not records[-1].has_classes
    write_run(folder / "run", records)
    return folder


@pytest.fixture(params=["tab", "report"])
def shown(request, folder, opened_in):
    with opened_in(request.param, folder) as tab:
        yield tab


def test_no_word_of_a_regression_is_class(shown):
    words = shown.root.locator(".input-hessian").inner_text()
    assert re.findall(r".*\bclass(?:es)?\b.*", words, re.IGNORECASE) == []
    assert "output 1" in shown.get("class-select").locator("option").all_inner_texts()
    assert "logit of output 1, sample 0" in shown.words("spectrum")
    assert "logit of output 1, sample 0" in shown.words("hessian")
    assert "every output" in shown.get("lines-select").inner_text()
    assert "All samples and outputs at this step" in words
    headings = shown.get("table").locator("th").all_inner_texts()
    assert "output" in headings
    assert not {"label", "predicted"} & set(headings)
    assert not re.search(r"label|predicted", shown.get("maps").inner_text())
