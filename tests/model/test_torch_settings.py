"""Torch's settings are those of exact second derivatives while measuring, and come back."""

import subprocess
import sys

import pytest
import torch
from support.networks import mlp
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_hessian import input_hessian
from lightning_hessian.model import torch_settings
from lightning_hessian.model.isolation import isolated
from lightning_hessian.model.torch_settings import CHECKPOINT_GENERATOR, PRECISION_SWITCHES, precision_switch

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
CPU = torch.device("cpu")


def flags():
    backends = torch.backends
    return {
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "matmul": torch.get_float32_matmul_precision(),
        "cudnn_tf32": backends.cudnn.allow_tf32,
        "cudnn": backends.cudnn.enabled,
        **{name: switch.fp32_precision for name in PRECISION_SWITCHES if (switch := precision_switch(name))},
        "fast_path": backends.mha.get_fastpath_enabled(),
        "math": backends.cuda.math_sdp_enabled(),
        "flash": backends.cuda.flash_sdp_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "checkpoint": [v for n, v in vars(torch.utils.checkpoint).items() if n.startswith(CHECKPOINT_GENERATOR)],
        "reentrant": torch.utils.checkpoint.CheckpointFunction.apply,
    }


@pytest.fixture(name="surroundings", params=["plain", "unusual"])
def _surroundings(request):
    if request.param == "plain":
        yield
        return
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16), torch.autograd.set_detect_anomaly(True):
        yield
    torch.set_default_dtype(torch.float32)
    torch.set_float32_matmul_precision("highest")


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("fail", [False, True])
def test_flags_are_set_inside_and_come_back(fail):
    before = flags()
    try:
        with isolated([nn.LSTM(2, 2)], CPU, torch.float32):
            inside = flags()
            if fail:
                raise KeyError
    except KeyError:
        pass
    assert flags() == before
    wanted = {"dtype": torch.float32, "grad": True, "anomaly": False, "autocast": False, "matmul": "highest"}
    wanted |= {"cudnn_tf32": False, "math": True, "flash": False, "fast_path": False, "cudnn": False}
    assert {k: inside[k] for k in wanted} == wanted


@pytest.mark.parametrize(("model", "off"), [(nn.GRU(2, 2), True), (nn.Conv1d(2, 2, 1), False)], ids=["rnn", "conv"])
@pytest.mark.parametrize("user", [True, False])
def test_cudnn_is_off_for_recurrent_networks_only(model, off, user, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "enabled", user)
    with isolated([nn.Sequential(model)], CPU, torch.float32):
        assert torch.backends.cudnn.enabled == (user and not off)
    assert torch.backends.cudnn.enabled == user


def test_tf32_is_off_inside_and_comes_back():
    torch.set_float32_matmul_precision("high")
    try:
        before = torch.backends.cuda.matmul.allow_tf32
        with isolated([mlp()], CPU, torch.float32):
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 == before is True
    finally:
        torch.set_float32_matmul_precision("highest")


def test_inference_mode_is_left_inside():
    net = mlp().float()
    expected = input_hessian(net, X, 0)
    with torch.inference_mode():
        inference_tensor = X.clone()
        assert torch.equal(input_hessian(net, inference_tensor, 0), expected)


class OwnAutocast(nn.Module):
    """Turns autocast on itself, in each of the two ways."""

    def __init__(self, decorated):
        super().__init__()
        self.net = mlp().float()
        self.run = torch.autocast("cpu", dtype=torch.bfloat16)(self.net.forward) if decorated else self.within

    def within(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.net(x)

    def forward(self, x):
        return self.run(x).float()


@pytest.mark.parametrize("decorated", [False, True])
def test_autocast_inside_of_a_forward_is_off(decorated):
    model = OwnAutocast(decorated)
    assert model.run(X).dtype == torch.bfloat16
    assert torch.equal(input_hessian(model, X, 0), input_hessian(model.net, X, 0))
    assert model.run(X).dtype == torch.bfloat16  # and on again outside


def test_the_cache_of_an_open_autocast_stays():
    layer = nn.Linear(6, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cached = layer(X)
        with torch.no_grad():
            layer.weight.mul_(2)  # the cache does not see it
        assert torch.equal(layer(X), cached)
        input_hessian(nn.Sequential(layer, nn.GELU()), X, 0)
        assert torch.equal(layer(X), cached)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.net = mlp().float()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(self.net, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_is_passed_through(reentrant):
    model = Checkpointed(reentrant)
    torch.testing.assert_close(input_hessian(model, X, 0), input_hessian(model.net, X, 0))
    model(X.requires_grad_()).sum().backward()  # and works as before afterwards
    assert model.net[0].weight.grad is not None
    X.requires_grad_(False)


def test_the_names_of_other_versions_of_torch(monkeypatch):
    """2.6 has no switches of the new kind, and 2.15 checkpoints by a function of another name."""
    unknown = ("cudnn.convolution", "quantum.matmul")
    monkeypatch.setattr(torch_settings, "PRECISION_SWITCHES", (*PRECISION_SWITCHES, *unknown))
    name = f"{CHECKPOINT_GENERATOR}_impl"
    monkeypatch.setattr(torch.utils.checkpoint, name, flags, raising=False)
    before = flags()
    with isolated([nn.Linear(2, 2)], CPU, torch.float32):
        generator = getattr(torch.utils.checkpoint, name)(mlp(), (X,), {}, use_reentrant=False)
        assert next(generator) is None
        assert next(generator, "end") == "end"
        assert precision_switch("cudnn.convolution") is precision_switch("quantum.matmul") is None
    assert flags() == before


FROZEN = """
import torch
from lightning_hessian import input_hessian
torch.backends.disable_global_flags()
model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
rnn = torch.nn.GRU(4, 2)
print(input_hessian(model, torch.ones(1, 4), 0).shape)
print(input_hessian(lambda x: rnn(x)[0], torch.ones(2, 4), 0).shape)
"""


def test_flags_that_are_frozen():
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", FROZEN], check=True, capture_output=True, text=True)
    assert found.stdout.split("\n")[:2] == ["torch.Size([1, 1, 4, 4])", "torch.Size([2, 1, 4, 4])"]


@pytest.mark.parametrize("inplace", [False, True])
def test_a_gate_of_hardsigmoid_has_a_hessian(inplace):
    """As in MobileNetV3: x · hardsigmoid(W x), with entries on all three pieces."""
    weight = 4 * torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gate = nn.Hardsigmoid(inplace=inplace)
    found = input_hessian(lambda x: (x * gate(x @ weight)).sum(1), x, 0)
    by_hand = torch.func.hessian(lambda v: (v * ((v @ weight + 3).clamp(0, 6) / 6)).sum())
    torch.testing.assert_close(found[:, 0], torch.func.vmap(by_hand)(x))
    assert found.any()
