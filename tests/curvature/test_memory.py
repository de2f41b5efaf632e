"""A measurement stays below max_memory, and works on fewer samples where the device runs out of memory."""

import os
import platform
import subprocess
import sys

import pytest
import torch
from support.counting import Notes
from support.networks import measure, mlp
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_hessian import MeasurementError, input_spectrum
from lightning_hessian.curvature import cost_model, memory
from lightning_hessian.curvature.batching import in_groups, out_of_memory
from lightning_hessian.curvature.checks.zero import zero_in_float64
from lightning_hessian.curvature.cost_model import GROUP_BYTES, ModelCosts, fitting_samples, result_bytes
from lightning_hessian.curvature.memory import MALLOC_SETTINGS, AllocatedBytes
from lightning_hessian.curvature.operators.autodiff import ForwardOverReverse
from lightning_hessian.curvature.operators.gauss_newton import jacobian, term_norms
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch

F64 = torch.float64

# Peak resident memory of a fresh process: before, after a bounded measurement, after one without a bound.
SCRIPT = """
import sys, torch
from torch import nn
from lightning_hessian.curvature.analysis import analyze
from lightning_hessian.curvature.methods.execute import execute
from lightning_hessian.curvature.methods.plan import make_plan
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.curvature.options import Options
method, case, count, memory = *sys.argv[1:3], int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
torch.manual_seed(0)
act = nn.ReLU() if method == "low_rank" else nn.GELU()
net, x = nn.Sequential(nn.Linear(256, 64), act, nn.Linear(64, 30)), torch.randn(count, 256)
if case == "convolution":
    net = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), act, nn.Conv2d(32, 32, 3, padding=1), act,
                        nn.Flatten(), nn.Linear(32 * 64, 5))
    x = x[:, :64].reshape(-1, 1, 8, 8)
net.requires_grad_(False)
classes = torch.arange(3 if case == "classes" else 1)

def measured(count, memory):
    batch = TargetBatch(net, lambda z, c: z.softmax(1).gather(1, c), x[:count], classes.expand(count, -1))
    options = Options(method=method, num_eigenvalues=4, max_memory=memory)
    analysis = analyze(batch, options)
    num_matrices = 8 if case == "heatmaps" else 0
    plan = make_plan(batch, analysis.costs, analysis.diagnosis, options, num_matrices=num_matrices)
    found = execute(batch, plan, options, target="prob", analysis=analysis)
    # not ru_maxrss, which starts at the peak of the process that started this one
    (peak,) = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    assert (found.hessian is not None) == (case == "heatmaps")
    return found.spectrum, 1024 * int(peak)

_, before = measured(8, memory)
few, bounded = measured(count, memory)
many, free = measured(count, 10**12)
difference = (few.eigenvalues - many.eigenvalues).abs().amax() / many.spectral_norm.max()
print(bounded - before, free - before, float(difference))
"""


@pytest.mark.parametrize(
    ("method", "case", "count", "mebibytes"),
    [
        ("dense", "mlp", 192, 32),
        ("low_rank", "mlp", 512, 32),
        ("lanczos", "mlp", 704, 24),
        ("dense", "classes", 64, 32),
        ("lanczos", "heatmaps", 512, 32),
        ("dense", "convolution", 96, 32),
    ],
)
def test_the_memory_of_a_measurement_is_bounded(method, case, count, mebibytes):
    memory = mebibytes * 2**20
    # glibc otherwise keeps freed tensors of this size, and resident memory is not that of the tensors
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SCRIPT, method, case, str(count), str(memory)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    bounded, free, difference = map(float, output.split())
    assert bounded <= memory < free
    assert difference < 1e-4


TOO_LARGE = Notes()


@pytest.mark.parametrize(
    ("num_fitting", "num_in_a_group", "device", "expected"),
    [
        (32, 4, "cpu", 4),
        (32, 1, "cpu", 2),
        (32, 0.1, "cpu", 2),
        (1, 1, "cpu", 1),
        (0, 4, "cpu", 1),
        (32, 4, "cuda", 32),
    ],
)
def test_samples_of_a_group(num_fitting, num_in_a_group, device, expected):
    """Large groups are slow on a CPU only; no sample is alone where two fit, since kernels may be wrong for one."""
    per_sample = int(GROUP_BYTES / num_in_a_group)
    assert fitting_samples(num_fitting * per_sample, per_sample, torch.device(device)) == expected


class Small(nn.Module):
    """A network on a device whose memory fits a few samples."""

    def __init__(self, net: nn.Module, num_fitting: int) -> None:
        super().__init__()
        self.net, self.num_fitting = net, num_fitting

    def forward(self, x):
        if x.numel() > self.num_fitting * 6:
            TOO_LARGE.append(len(x))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return self.net(x)


@pytest.mark.parametrize("method", ["dense", "low_rank", "lanczos"])
def test_out_of_memory_halves_what_is_done_at_once(method):
    net, x = mlp(nn.ReLU), torch.randn(21, 6, dtype=F64)
    whole = input_spectrum(net, x, [0, 2], "prob", method=method, num_eigenvalues=4)
    TOO_LARGE.clear()
    found = input_spectrum(Small(net, num_fitting=6), x, [0, 2], "prob", method=method, num_eigenvalues=4)
    assert len(TOO_LARGE) > 2
    for name in ("eigenvalues", "gradient", "trace", "diagonal"):
        torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-6, atol=1e-9)


def test_a_curved_network_on_a_small_device():
    net, x = mlp(), torch.randn(21, 6, dtype=F64)
    found = input_spectrum(Small(net, num_fitting=6), x, "all")
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


@pytest.mark.parametrize(
    "words",
    [
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TiB",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory (MPS allocated: 17 GB, other allocations: 1 GB, max allowed: 18 GB).",
    ],
)
def test_the_messages_of_every_device_are_recognized(words):
    assert out_of_memory(RuntimeError(words))
    assert not out_of_memory(ValueError(words))


@pytest.mark.parametrize("method", ["auto", "dense", "lanczos"])
def test_a_device_whose_memory_fits_one_sample(method):
    net, x = mlp(), torch.randn(7, 6, dtype=F64)
    classes = 1 if method == "lanczos" else "all"  # lanczos takes every class as a sample of its own
    found = input_spectrum(Small(net, num_fitting=1), x, classes, "prob", method=method, chunk_size=1)
    whole = input_spectrum(net, x, classes, "prob", method="dense")
    torch.testing.assert_close(found.lambda_max, whole.lambda_max, rtol=1e-6, atol=1e-9)
    assert found.valid.all()


def test_a_wrong_derivative_is_detected_where_memory_fits_one_sample():
    class Detached(nn.Module):
        def forward(self, x):
            return x.detach() * x.square().sum(1, keepdim=True)

    with pytest.warns(UserWarning, match="Finite differences contradict"):
        input_spectrum(Small(Detached(), num_fitting=1), torch.randn(4, 6, dtype=F64), 1, method="dense", chunk_size=1)


@pytest.mark.parametrize(
    "work",
    [lambda given: zero_in_float64(given, torch.Generator()), jacobian],
    ids=["zero_in_float64", "jacobian"],
)
def test_running_out_of_memory_is_no_missing_rule(work):
    def no_memory(x):
        raise torch.OutOfMemoryError("no more")

    classes = torch.zeros(2, 1, dtype=torch.long)
    given = TargetBatch(no_memory, lambda z, c: z.gather(1, c), torch.randn(2, 6), classes)
    with pytest.raises(RuntimeError, match=r"no more|ran out of memory"):
        work(given)


def test_batched_backward_passes_that_run_out_of_memory_raise(monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("lightning_hessian.curvature.operators.gauss_newton.vjp", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        jacobian(few_targets(mlp()))


def test_forward_mode_that_runs_out_of_memory_is_not_wrong(monkeypatch):
    def no_memory(self, basis):
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr("lightning_hessian.curvature.operators.autodiff.ForwardOverReverse.columns", no_memory)
    with pytest.raises(MeasurementError, match="ran out of memory"):
        measure(few_targets(mlp()), "prob", Options(method="dense"))


def few_targets(net, count=2, inputs=6):
    classes = torch.zeros(count, 1, dtype=torch.long)
    return TargetBatch(net, lambda z, c: z.softmax(1).gather(1, c), torch.randn(count, inputs, dtype=F64), classes)


class Largest(AllocatedBytes):
    """The most bytes that a single operation made."""

    largest = 0

    def __torch_dispatch__(self, *given):
        before = self.total
        result = super().__torch_dispatch__(*given)
        self.largest = max(self.largest, self.total - before)
        return result


def test_thousands_of_outputs_are_never_squared():
    """C = 3000: A alone is 72 MB a sample, and its columns at once some ten times that."""
    given = few_targets(mlp(outputs=3000))
    matrices = torch.randn(2, 1, 6, 6, dtype=F64)
    with Largest() as made:
        norms = term_norms(given, matrices)
    assert made.largest < 5_000_000
    for n in range(2):
        rows, z = torch.func.jacrev(given.network)(given.x[n]), given.network(given.x[n])
        p = z.softmax(0)
        centered = rows - p @ rows  # A = p_0 (u uᵀ − diag p + p pᵀ) with u = e_0 − p
        jaj = p[0] * (torch.outer(centered[0], centered[0]) - (centered.mT * p) @ centered)
        for norm, term in ((norms.gauss_newton, jaj), (norms.functional, matrices[n, 0] - jaj)):
            torch.testing.assert_close(norm[n, 0], torch.linalg.matrix_norm(term), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("method", ["lanczos", "low_rank"])
def test_whole_matrices_that_do_not_fit_are_left_out(method):
    """The monitor says so, with the memory that they need (``test_plan``)."""
    given = few_targets(mlp(nn.ReLU if method == "low_rank" else nn.GELU, inputs=300), inputs=300)
    enough = result_bytes(given, Options(), 1) + 8 * 300**2
    found = measure(given, "prob", Options(method=method, max_memory=enough), num_matrices=1)
    assert found.hessian is None
    assert found.plan.num_matrices == 0
    assert found.spectrum.diagnosis.trusted
    need = found.plan.memory_for_matrices
    assert measure(given, "prob", Options(method=method, max_memory=need), num_matrices=1).hessian is not None
    assert measure(given, "prob", Options(method=method, max_memory=need - 1), num_matrices=1).hessian is None


@pytest.mark.parametrize(("memory", "counted"), [(None, []), (3_000_000, ["matvec"])])
def test_costs_are_counted_where_memory_is_short_and_then_once(monkeypatch, memory, counted):
    measured, matvec = [], cost_model._matvec
    monkeypatch.setattr(cost_model, "_matvec", lambda few: measured.append("matvec") or matvec(few))
    input_spectrum(mlp(inputs=20, width=2000), torch.randn(2, 20, dtype=F64), 0, max_memory=memory)
    assert measured == counted


class Recurrent(nn.Module):
    """A sequence of four times two numbers."""

    def __init__(self):
        super().__init__()
        self.cell, self.head = nn.Linear(10, 8), nn.Linear(8, 3)

    def forward(self, x):
        state = x.new_zeros(len(x), 8)
        for entries in x.view(len(x), 4, 2).unbind(1):
            state = torch.tanh(self.cell(torch.cat([state, entries], dim=1)))
        return self.head(state)


def convolutional():
    layers = [nn.Unflatten(1, (1, 8)), nn.Conv1d(1, 16, 3), nn.SiLU(), nn.MaxPool1d(2), nn.GroupNorm(2, 16)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(48, 3))


def attention():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0, activation="gelu", batch_first=True)
    return nn.Sequential(nn.Unflatten(1, (4, 2)), nn.Linear(2, 8), layer, nn.Flatten(), nn.Linear(32, 3)).eval()


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("network", [lambda: mlp(inputs=8), Recurrent, convolutional, attention])
def test_the_estimate_is_more_than_derivatives_take(network, num_classes):
    classes = torch.arange(num_classes).expand(2, -1)
    given = TargetBatch(network().double(), lambda z, c: z.gather(1, c), torch.randn(2, 8, dtype=F64), classes)
    costs = ModelCosts(given)
    with sdpa_kernel(SDPBackend.MATH), AllocatedBytes() as allocated:
        ForwardOverReverse(given).columns(torch.eye(8, dtype=F64))
    assert allocated.peak <= 2 * 8 * costs.column_estimate
    with sdpa_kernel(SDPBackend.MATH), AllocatedBytes() as allocated:
        cost_model._matvec(given)
    assert allocated.peak <= 2 * costs.column_estimate


def test_the_peak_is_what_is_in_use_at_once():
    with AllocatedBytes() as allocated:
        for _ in range(3):
            x = torch.ones(1000, dtype=F64)
            x.view(10, 100)[2:].mul_(2)  # no new memory
            del x
        kept = [torch.ones(1000, dtype=F64), torch.ones(500, dtype=F64)]
    assert allocated.total == 8 * 4500
    assert allocated.peak == 8 * 1500
    assert len(kept) == 2


def test_tensors_without_memory_are_counted_as_none():
    with AllocatedBytes() as allocated:
        assert torch._efficientzerotensor(1000).sum() == 0
    assert allocated.peak < 100


# Page faults of allocating 128 MiB twice, and what stays resident of it: outside, inside and after ``kept_pages``.
PAGES = """
import resource, torch
from lightning_hessian.curvature.memory import kept_pages
cpu = torch.device("cpu")

def resident():  # without pages of libraries, which the kernel takes and gives as it likes
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

def faults():
    torch.ones(2**25 + 2**10)  # glibc's holes fit what is a little smaller
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**25)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside, before = faults(), resident()
with kept_pages(cpu):
    with kept_pages(cpu):
        faults()
    inside = faults()
print(outside, inside, faults(), resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
@pytest.mark.parametrize("setting", [{}, {"MALLOC_MMAP_THRESHOLD_": "65536"}])
def test_pages_are_kept_inside_the_context_alone(setting):
    environment = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
    output = subprocess.run([sys.executable, "-c", PAGES], check=True, capture_output=True, env=environment | setting)
    outside, inside, after, resident = map(int, output.stdout.split())
    many = 128 * 2**20 // 4096 // 2
    assert outside > many
    assert after > many
    assert (inside > many) == bool(setting)  # the user's own setting is respected
    assert resident < 64 * 2**20


def test_glibc_has_the_highest_values_it_adapts_to_afterwards(monkeypatch):
    calls = []

    class Libc:
        def mallopt(self, parameter, value):
            calls.append((parameter, value))

        def malloc_trim(self, pad):
            calls.append(("trim", pad))

    monkeypatch.setattr(memory, "_adjustable_glibc", Libc)
    monkeypatch.setattr(memory, "_resident_bytes", lambda: len(calls) * 2**30)
    with memory.kept_pages(torch.device("cpu")):
        assert calls == [(-3, 2**31 - 1), (-1, 2**31 - 1)]
        memory.return_pages(2**60)
        memory.return_pages(-(2**60))
    assert calls[2:] == [("trim", 0), (-3, 32 * 2**20), (-1, 64 * 2**20), ("trim", 64 * 2**20)]


def test_pages_of_files_are_not_counted_as_kept(monkeypatch):
    """Where the kernel takes those of libraries meanwhile, freed memory would seem to be less than it is."""
    monkeypatch.setattr(memory.Path, "read_text", lambda path: "900 500 300 100 0 700 0")
    assert memory._resident_bytes() == 200 * os.sysconf("SC_PAGE_SIZE")


def test_bytes_are_counted_per_sample_over_two():
    batch = TargetBatch(mlp(), lambda z, c: z, torch.randn(5, 6, dtype=F64), torch.zeros(5, 1).long())
    assert memory.allocated_per_sample(batch, lambda few: few.x + 1) == 6 * 8
