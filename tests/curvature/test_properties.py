"""Properties that hold for every shape, dtype, class, target and chunk size."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_hessian import MeasurementError, input_hessian, input_hvp, input_spectrum

F32, F64 = torch.float32, torch.float64
TARGETS = {
    "logit": lambda z: z,
    "log_prob": lambda z: z.log_softmax(-1),
    "prob": lambda z: z.softmax(-1),
    "loss": lambda z: -z.log_softmax(-1),
    "margin": lambda z: z - torch.stack([z[torch.arange(len(z)) != k].max() for k in range(len(z))]),
    "entropy_term": lambda z: -z.softmax(-1) * z.log_softmax(-1),  # not in the package: given as a callable
}
ROUNDING = {F32: 2e-4, F64: 1e-9}  # relative to a Hessian's norm


def quick(max_examples):
    calm = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}  # a busy machine is slow
    return settings(max_examples=max_examples, derandomize=True, database=None, **calm)


@dataclass(frozen=True)
class Case:
    """A random network, its samples, and what is asked of it."""

    seed: int
    shape: tuple[int, ...]
    num_samples: int
    num_outputs: int
    activation: type[nn.Module]
    dtype: torch.dtype
    target_name: str
    naming: str

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def net(self) -> nn.Module:
        torch.manual_seed(self.seed)
        layers = [nn.Flatten(), nn.Linear(self.size, 9), self.activation(), nn.Linear(9, 7), self.activation()]
        return nn.Sequential(*layers, nn.Linear(7, self.num_outputs)).double()

    @property
    def x(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.num_samples, *self.shape, generator=generator).to(self.dtype)

    @property
    def indices(self) -> Tensor:
        """The classes as ``[N, K]``."""
        drawn = torch.randint(self.num_outputs, (self.num_samples, 2), generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            predicted = self.net(self.x.double()).argmax(1, keepdim=True)
        return {
            "int": torch.full((self.num_samples, 1), self.num_outputs - 1),
            "list": torch.tensor([[self.num_outputs - 1, 0]]).expand(self.num_samples, -1),
            "all": torch.arange(self.num_outputs).expand(self.num_samples, -1),
            "predicted": predicted,
            "per_sample": drawn,
        }[self.naming]

    @property
    def classes(self):
        """The classes as a user names them."""
        named = {"int": self.num_outputs - 1, "list": [self.num_outputs - 1, 0], "per_sample": self.indices}
        return named.get(self.naming, self.naming)

    @property
    def target(self):
        """The target as a user gives it."""
        if self.target_name == "entropy_term":
            return lambda z, classes: TARGETS["entropy_term"](z).gather(1, classes)
        return self.target_name

    @property
    def arguments(self):
        return self.net, self.x, self.classes, self.target

    def reference(self) -> Tensor:
        """``[N, K, D, D]`` in float64 by ``torch.func.hessian``, the targets written anew."""
        net, value = self.net, TARGETS[self.target_name]
        hessian = torch.func.hessian(lambda v: value(net(v.reshape(1, *self.shape))[0]))
        everything = torch.stack([hessian(v) for v in self.x.double().flatten(1)])
        return everything.detach()[torch.arange(self.num_samples).unsqueeze(1), self.indices]


SMOOTH, PIECEWISE_LINEAR = [nn.GELU, nn.Tanh, nn.Softplus], [nn.ReLU, nn.LeakyReLU]
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)


@st.composite
def cases(draw, activations=(*SMOOTH, *PIECEWISE_LINEAR), shapes=SHAPES, targets=tuple(TARGETS)):
    return Case(
        seed=draw(st.integers(0, 999)),
        shape=draw(shapes),
        num_samples=draw(st.integers(1, 4)),
        num_outputs=draw(st.integers(2, 5)),
        activation=draw(st.sampled_from(activations)),
        dtype=draw(st.sampled_from([F64, F32])),
        target_name=draw(st.sampled_from(targets)),
        naming=draw(st.sampled_from(["int", "list", "all", "predicted", "per_sample"])),
    )


def assert_same(actual: Tensor, expected: Tensor, case: Case, dims: int) -> None:
    """Equal to rounding, relative to the norm of each problem's numbers (its last ``dims`` dimensions)."""
    assert actual.dtype == case.dtype
    assert actual.shape == expected.shape
    last = tuple(range(-dims, 0))
    error = (actual.double() - expected.double()).pow(2).sum(last).sqrt()
    assert (error <= ROUNDING[case.dtype] * (expected.double().pow(2).sum(last).sqrt() + 1e-2)).all()


@quick(14)
@given(cases(), st.one_of(st.just("auto"), st.integers(1, 70)))
def test_every_chunk_size_gives_the_hessian(case, chunk_size):
    hessian = input_hessian(*case.arguments, chunk_size=chunk_size)
    assert torch.equal(hessian, hessian.mT)
    assert_same(hessian, case.reference(), case, 2)


@quick(4)
@given(cases(activations=SMOOTH, shapes=st.sampled_from([(2, 3, 3), (12,)])), st.sampled_from(["auto", 5]))
def test_the_memory_that_an_error_names_is_enough_and_changes_no_number(case, chunk_size):
    expected = case.reference()
    result_bytes = expected.numel() * case.x.element_size()
    with pytest.raises(MeasurementError, match="of one sample") as error:
        input_hessian(*case.arguments, chunk_size=chunk_size, max_memory=result_bytes + 1)
    amount, unit = re.search(r"of one sample takes? ([\d.]+) (bytes|KiB)", str(error.value)).groups()
    for_one_sample = int(1.01 * float(amount) * {"bytes": 1, "KiB": 1024}[unit])
    hessian = input_hessian(*case.arguments, chunk_size=chunk_size, max_memory=result_bytes + for_one_sample)
    assert_same(hessian, expected, case, 2)


@quick(12)
@given(cases(), st.sampled_from(["one", "per sample", "in the shape of x", "per problem"]))
def test_the_product_is_the_matrix_times_the_vector(case, form):
    num_samples, num_classes = case.indices.shape
    shape = {
        "one": (case.size,),
        "per sample": (num_samples, case.size),
        "in the shape of x": case.x.shape,
        "per problem": (num_samples, num_classes, case.size),
    }[form]
    v = torch.randn(shape, generator=torch.Generator().manual_seed(case.seed), dtype=case.dtype)
    each = v if form in ("one", "per problem") else v.reshape(num_samples, 1, case.size)
    net, x, classes, target = case.arguments
    product = input_hvp(net, x, v, classes, target)
    expected = (input_hessian(net, x, classes, target) @ each.expand(*product.shape).unsqueeze(-1)).squeeze(-1)
    assert_same(product, expected, case, 1)


def with_zeros(eigenvalues: Tensor, size: int) -> Tensor:
    """A complete spectrum ``[N, K, D]`` in descending order, the zeros that were left out put in."""
    return F.pad(eigenvalues, (0, size - eigenvalues.shape[-1])).sort(descending=True).values


@quick(12)
@given(cases(activations=(*PIECEWISE_LINEAR, nn.GELU)), st.integers(1, 5))
def test_dense_and_low_rank_agree_on_a_complete_spectrum(case, num_eigenvalues):
    matrices = case.reference()
    for method in ("dense", "low_rank") if case.activation in PIECEWISE_LINEAR else ("dense",):
        spectrum = input_spectrum(*case.arguments, method=method, num_eigenvalues=num_eigenvalues)
        assert spectrum.complete
        eigenvalues = with_zeros(spectrum.eigenvalues, case.size)
        assert_same(eigenvalues, torch.linalg.eigvalsh(matrices).flip(-1), case, 1)
        assert_same(eigenvalues.sum(-1, keepdim=True), spectrum.trace.unsqueeze(-1), case, 1)
        assert_same(spectrum.diagonal, matrices.diagonal(dim1=-2, dim2=-1), case, 1)
        norm = torch.linalg.matrix_norm(matrices).unsqueeze(-1)
        assert_same(spectrum.frobenius_norm.unsqueeze(-1), norm, case, 1)
        vectors = spectrum.eigenvectors
        values = spectrum.eigenvalues.gather(-1, spectrum.vector_index)
        assert_same(vectors @ matrices.to(case.dtype), vectors * values.unsqueeze(-1), case, 2)


@quick(10)
@given(cases(shapes=st.sampled_from([(7,), (3, 2, 4)])), st.sampled_from(["dense", "lanczos"]))
def test_the_spectrum_of_the_negated_target_is_minus_the_spectrum(case, method):
    net, x, _, _ = case.arguments
    value, classes = TARGETS[case.target_name], case.indices

    def signed(sign):
        def target(z, classes):
            return sign * torch.stack([value(row) for row in z]).gather(1, classes)

        return input_spectrum(net, x, classes, target, method=method)

    up, down = signed(1), signed(-1)
    assert_same(down.eigenvalues, -up.eigenvalues.flip(-1), case, 1)
    assert_same(down.gradient, -up.gradient, case, 1)


@quick(12)
@given(cases(shapes=st.sampled_from([(1,), (5,), (4, 4), (2, 5, 6), (90,)])), st.integers(1, 7))
def test_lanczos_lies_within_its_residuals_of_the_ends(case, num_eigenvalues):
    found = input_spectrum(*case.arguments, method="lanczos", num_eigenvalues=num_eigenvalues)
    truth = torch.linalg.eigvalsh(case.reference()).flip(-1)
    count = min(max(2, num_eigenvalues), case.size)  # one from each end at least
    assert found.eigenvalues.shape[-1] == count
    if count < case.size:
        truth = torch.cat([truth[..., : (count + 1) // 2], truth[..., case.size - count // 2 :]], dim=-1)
    rounding = ROUNDING[case.dtype] * truth.abs().amax(-1, keepdim=True) + 1e-8
    assert ((found.eigenvalues - truth).abs() <= found.residuals + rounding).all()
    assert (found.residuals <= 1.01e-3 * truth.abs().amax(-1, keepdim=True) + rounding).all()
    if found.complete:
        assert_same(found.trace.unsqueeze(-1), found.eigenvalues.sum(-1, keepdim=True), case, 1)
