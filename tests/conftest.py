"""Fixtures shared by all tests: a seeded start, one thread."""

import os

import matplotlib
import pytest
import torch

# The networks of the tests are small, and pytest runs a worker per core: more threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
torch.set_num_threads(1)
matplotlib.use("agg")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
