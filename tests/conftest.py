"""Fixtures shared by all tests: a seeded start, one thread."""

import matplotlib
import pytest
import torch

matplotlib.use("agg")
torch.set_num_threads(1)  # the networks of the tests are small: threads would wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
