"""What a measurement takes stays below max_memory, and a device that runs out is given less at once."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import mlp
from torch import nn

from lightning_hessian import MeasurementError, input_spectrum
from lightning_hessian.curvature.memory import in_groups

F64 = torch.float64

# Peak resident memory of a fresh process: before, after a bounded measurement, after one without a bound.
SCRIPT = """
import sys, torch
from torch import nn
from lightning_hessian import input_spectrum
method, count, memory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
torch.manual_seed(0)
bend = nn.ReLU() if method == "low_rank" else nn.GELU()
net, x = nn.Sequential(nn.Linear(256, 64), bend, nn.Linear(64, 30)), torch.randn(count, 256)

def measured(count, memory):
    spectrum = input_spectrum(net, x[:count], 1, "prob", method=method, num_eigenvalues=4, max_memory=memory)
    # not ru_maxrss, which starts at the peak of the process that started this one
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return spectrum, 1024 * int(peak)

_, before = measured(4, memory)
few, bounded = measured(count, memory)
many, free = measured(count, 10**12)
difference = (few.eigenvalues - many.eigenvalues).abs().amax() / many.spectral_norm.max()
print(bounded - before, free - before, float(difference))
"""


@pytest.mark.parametrize(
    ("method", "count", "mebibytes"), [("dense", 192, 32), ("low_rank", 512, 32), ("lanczos", 896, 24)]
)
def test_the_memory_of_a_measurement_is_bounded(method, count, mebibytes):
    memory = mebibytes * 2**20
    # glibc otherwise keeps freed tensors of this size, and resident memory is not that of the tensors
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SCRIPT, method, str(count), str(memory)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    bounded, free, difference = map(float, told.split())
    assert bounded <= 1.25 * memory < free
    assert difference < 1e-4


REFUSED = []  # outside of the model, whose attributes a measurement puts back


class Small(nn.Module):
    """A network on a device with room for a few samples."""

    def __init__(self, net: nn.Module, room: int) -> None:
        super().__init__()
        self.net, self.room = net, room

    def forward(self, x):
        if x.numel() > self.room * 6:
            REFUSED.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return self.net(x)


@pytest.mark.parametrize("method", ["dense", "low_rank", "lanczos"])
def test_out_of_memory_halves_what_is_done_at_once(method):
    net, x = mlp(nn.ReLU), torch.randn(21, 6, dtype=F64)
    whole = input_spectrum(net, x, [0, 2], "prob", method=method, num_eigenvalues=4)
    REFUSED.clear()
    found = input_spectrum(Small(net, room=6), x, [0, 2], "prob", method=method, num_eigenvalues=4)
    assert len(REFUSED) > 2
    for name in ("eigenvalues", "gradient", "trace", "diagonal"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-9)


def test_a_curved_network_on_a_small_device():
    net, x = mlp(), torch.randn(21, 6, dtype=F64)
    found = input_spectrum(Small(net, room=6), x, "all")
    torch.testing.assert_close(found.eigenvalues, input_spectrum(net, x, "all").eigenvalues, rtol=1e-9, atol=1e-12)


def test_samples_are_halved_until_they_fit():
    seen = []

    def work(samples: slice) -> int:
        count = samples.stop - samples.start
        seen.append(count)
        if count > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TiB")
        return count

    groups = list(in_groups(10, 100, work))
    assert seen == [10, 5, 2, 2, 2, 2, 2]
    assert [samples.start for samples, _ in groups] == [0, 2, 4, 6, 8]


def test_other_errors_are_not_memory():
    def work(samples: slice) -> None:
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(in_groups(4, 4, work))


def test_a_single_sample_that_does_not_fit_the_device():
    def work(samples: slice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MeasurementError, match="ran out of memory with a single sample"):
        list(in_groups(4, 4, work))
