"""The dtype of a measurement: what was asked for, or what the model can be evaluated in."""

import warnings

import pytest
import torch
from support.counting import Notes
from support.networks import mlp
from torch import nn

from lightning_hessian import ConfigurationError, input_hessian
from lightning_hessian.model.function import ModelFunction
from lightning_hessian.model.prepare import prepare, usable_dtype

F32, F64 = torch.float32, torch.float64


class SinglePrecision(nn.Module):
    """Casts its input to float32 and counts its calls outside of itself."""

    calls = Notes()

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp().float()

    def forward(self, x):
        self.calls.append(len(x))
        return self.net(x.float())


@pytest.mark.parametrize(("x", "dtype"), [(F32, F64), (F64, None)])
def test_float32_where_float64_is_impossible(x, dtype):
    with pytest.warns(UserWarning, match=r"cannot be evaluated in float64 .*: measured in float32"):
        assert usable_dtype(ModelFunction(SinglePrecision()), torch.randn(3, 6, dtype=x), dtype) == F32


@pytest.mark.parametrize(
    ("x", "dtype", "expected"), [(F32, None, F32), (F64, None, F64), (F32, F64, F64), (F64, F32, F32)]
)
def test_the_dtype_that_was_asked_for(x, dtype, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable_dtype(ModelFunction(mlp()), torch.randn(3, 6, dtype=x), dtype) == expected


def test_float32_needs_no_forward_pass_and_float64_two_samples():
    SinglePrecision.calls.clear()
    usable_dtype(ModelFunction(SinglePrecision()), torch.randn(9, 6))
    assert list(SinglePrecision.calls) == []
    with pytest.warns(UserWarning, match="measured in float32"):
        usable_dtype(ModelFunction(SinglePrecision()), torch.randn(9, 6), F64)
    assert list(SinglePrecision.calls) == [2]


def test_prepare_uses_the_given_dtype_and_no_other():
    """As decided once, on rank 0: no rank may decide otherwise."""
    x = torch.randn(3, 6, dtype=F64)
    for dtype in (F32, F64):
        with prepare(ModelFunction(mlp()), x, 0, "logit", dtype=dtype) as prepared:
            assert prepared.batch.x.dtype == dtype
    with (
        pytest.raises(RuntimeError, match="same dtype"),
        prepare(ModelFunction(SinglePrecision()), x, 0, "logit", dtype=F64),
    ):
        pass


def test_another_dtype_is_a_configuration_error():
    with pytest.raises(ConfigurationError, match=r"dtype=torch\.float16 is not possible"):
        usable_dtype(ModelFunction(mlp()), torch.randn(3, 6), torch.float16)


class InThrees(torch.nn.Module):
    """Accepts batches of three samples only."""

    def forward(self, x):
        return x.reshape(-1, 3, 6).sin().sum(dim=2).reshape(-1, 1)


def test_float64_where_the_forward_accepts_the_whole_batch_only():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert usable_dtype(ModelFunction(InThrees()), torch.randn(3, 6, dtype=F64)) == F64


class SeededFeatures(nn.Module):
    """Draws its first layer in every forward, always from the same seed, in torch's default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        weight = torch.randn(x.shape[1], 16, generator=torch.Generator().manual_seed(0))
        return self.out(torch.cos(x @ weight.to(x.dtype)))


def own_hessian(model, x):
    """By torch alone, as the model is used."""
    return torch.stack([torch.autograd.functional.hessian(lambda one: model(one[None])[0, 0], sample) for sample in x])


@pytest.mark.parametrize("own", [F32, F64])
def test_a_function_that_is_another_one_in_float64_is_announced(own):
    """From the same seed, torch draws other numbers in float64; what is not finite changes nothing."""
    model, x = SeededFeatures().to(own), torch.randn(3, 5, dtype=own)
    model.out.bias.data[2] = -torch.inf
    with pytest.warns(UserWarning, match=r"outputs are not those that it has by itself: .* as torch\.randn does"):
        found = input_hessian(model, x, 0, dtype=F64)[:, 0]
    assert not torch.allclose(found, own_hessian(model, x).double(), rtol=0.1)


def test_a_function_in_float32_is_the_model_s_own():
    model, x = SeededFeatures(), torch.randn(3, 5)
    torch.testing.assert_close(input_hessian(model, x, 0)[:, 0], own_hessian(model, x), rtol=1e-4, atol=1e-5)


def test_new_tensors_follow_a_model_in_float64():
    def model(x):
        outputs = torch.zeros(len(x), 3)
        outputs[:] = x[:, :3].tanh()
        return outputs

    x = torch.randn(2, 3, dtype=F64)
    found = input_hessian(model, x, 0)[:, 0]
    expected = torch.zeros(2, 3, 3, dtype=F64)
    expected[:, 0, 0] = -2 * x[:, 0].tanh() * (1 - x[:, 0].tanh() ** 2)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16])
def test_new_tensors_have_no_less_precision_than_the_measurement(default):
    seen = Notes()

    def model(x):
        seen.append(torch.zeros(1).dtype)
        return x.pow(3)

    torch.set_default_dtype(default)
    try:
        input_hessian(model, torch.randn(2, 3, dtype=F32), 0)
    finally:
        torch.set_default_dtype(F32)
    assert set(seen) == {F32}
