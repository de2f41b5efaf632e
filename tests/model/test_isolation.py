"""What a forward of any kind of model writes comes back, and its Hessians are right."""

import functools
import random
import warnings

import numpy as np
import pytest
import torch
from support.counting import Notes
from support.finite_differences import finite_differences
from support.networks import mlp
from torch import nn

from lightning_hessian import input_gradient, input_hessian, input_spectrum
from lightning_hessian.model.function import ModelFunction
from lightning_hessian.model.isolation import ONE_AT_A_TIME
from lightning_hessian.model.state_snapshot import StateSnapshot

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
CPU = torch.device("cpu")


class Careless(nn.Module):
    """A forward that writes everywhere it can."""

    def __init__(self):
        super().__init__()
        self.net = mlp().float()
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("count", torch.zeros(()))
        self.generator = torch.Generator().manual_seed(3)
        self.history = {"all": []}
        self.last = torch.zeros(1)
        self.plain = type("Counter", (), {})()
        self.plain.calls = 0

    def forward(self, x):
        self.mean = x.mean(0)
        self.count += 1
        self.last = x
        self.history["all"].append(x)
        self.plain.calls += 1
        self.fresh = x
        torch.rand(1, generator=self.generator), torch.rand(1), random.random(), np.random.rand()  # noqa: NPY002
        return self.net(x)


def test_a_large_plain_tensor_that_a_forward_writes_to_warns(monkeypatch):
    class Bank(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.bank = mlp().float(), torch.zeros(2**18)

        def forward(self, x):
            self.bank += 1
            return self.net(x)

    model = Bank()
    input_hessian(model, X, 0)
    assert not model.bank.any()
    monkeypatch.setattr("lightning_hessian.model.state_snapshot.LARGEST_COPY", 2**20 - 1)
    with pytest.warns(UserWarning, match="more than 0 MiB.*leaves it changed. Register it with register_buffer"):
        input_hessian(model, X, 0)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, lambda m: m.forward, lambda m: lambda x: m(x)], ids=["module", "method", "function"]
)
def test_what_a_careless_forward_writes_is_put_back(wrap):
    model = Careless()
    mean, last, state = model.mean, model.last, model.generator.get_state()
    streams = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    input_spectrum(wrap(model), X, "all", "prob")
    assert model.mean is mean
    assert not model.mean.any()
    assert float(model.count) == 0
    assert model.last is last
    assert model.history == {"all": []}
    assert model.plain.calls == 0
    assert not hasattr(model, "fresh")
    assert torch.equal(model.generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert random.getstate() == streams[1]
    assert np.random.get_state()[1].tolist() == streams[2]  # noqa: NPY002


def test_a_function_around_a_module_measures_it_in_eval_mode():
    net = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.GELU(), nn.Linear(4, 2))
    mean = net[1].running_mean.clone()
    expected = input_hessian(net, X, 0)
    torch.testing.assert_close(input_hessian(lambda x: net(x), X, 0), expected)
    assert torch.equal(net[1].running_mean, mean)
    assert net.training


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(2, 5, batch_first=True)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Padded(Attention):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x):
        padding = torch.tensor([False, False, True]).expand(len(x), -1)
        return self.head(self.encoder(x, src_key_padding_mask=padding).mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
def test_padded_attention_is_measured_by_the_path_that_training_takes():
    """In eval mode without gradients, torch's fast path gives zeros at padding: another function."""
    model, x = Padded().double(), torch.randn(2, 3, 4, dtype=torch.float64)
    model.eval()
    with torch.no_grad():
        trap = model(x)
    assert not torch.allclose(trap, model(x.requires_grad_()))
    x.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        spectrum = input_spectrum(model, x, 1)
    expected = finite_differences(model, x, 1)
    assert spectrum.diagnosis.trusted
    assert (input_hessian(model, x, 1)[:, 0] - expected).norm() < 1e-6 * expected.norm()


def normalized(norm):
    return nn.Sequential(norm(nn.Linear(6, 8)), nn.Tanh(), nn.Linear(8, 3))


def group_norm():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3))


MODELS = {
    "lstm": (lambda: Recurrent(nn.LSTM), (4, 2)),
    "gru": (lambda: Recurrent(nn.GRU), (4, 2)),
    "transformer": (Attention, (3, 4)),
    "group_norm": (group_norm, (1, 4, 4)),
    "layer_norm": (lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), (6,)),
    "weight_norm": (lambda: normalized(nn.utils.parametrizations.weight_norm), (6,)),
    "spectral_norm": (lambda: normalized(nn.utils.parametrizations.spectral_norm), (6,)),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_every_kind_against_finite_differences(name):
    make, shape = MODELS[name]
    net, x = make(), torch.randn(2, *shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated")
        hessian = input_hessian(net, x, 1)
    expected = finite_differences(net.eval().double(), x.double(), 1)
    assert (hessian[:, 0] - expected).norm() < 1e-4 * expected.norm()


def test_a_compiled_module_is_right_and_stays_compiled():
    net = mlp().float()
    compiled = torch.compile(net, backend="aot_eager")
    compiled(X)
    torch.testing.assert_close(input_hessian(compiled, X, 0), input_hessian(net, X, 0))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(X)


def test_float64_falls_back_where_a_forward_says_float():
    net = mlp().float()

    class Casting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x.float())

    with pytest.warns(UserWarning, match=r"cannot be evaluated in float64.*measured in float32"):
        hessian = input_hessian(Casting(), X, 0, dtype=torch.float64)
    assert hessian.dtype == torch.float32
    torch.testing.assert_close(hessian, input_hessian(net, X, 0))


class Node:
    def __init__(self, following):
        self.following = following


def test_long_chains_of_objects_are_followed_a_few_steps_only():
    model = mlp().float()
    model.chain = None
    for _ in range(5000):
        model.chain = Node(model.chain)
    assert input_hessian(model, X, 0).isfinite().all()


def test_a_sparse_tensor_that_a_module_holds():
    class Graph(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.adjacency = mlp().float(), torch.eye(6).to_sparse()

        def forward(self, x):
            return self.net((self.adjacency @ x.T).T)

    model = Graph()
    torch.testing.assert_close(input_hessian(model, X, 0), input_hessian(model.net, X, 0))


def test_what_lies_three_containers_deep_is_put_back():
    class Deep(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.counts = mlp().float(), [{"all": [torch.zeros(1)]}]

        def forward(self, x):
            self.counts[0]["all"][0] += 1
            return self.net(x)

    model = Deep()
    input_hessian(model, X, 0)
    assert float(model.counts[0]["all"][0]) == 0


def batch_norm_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(), nn.Linear(6, 3))


class Wrapper:
    """Not a module."""

    def __init__(self, net):
        self.parts = {"net": net}

    def __call__(self, x):
        return self.parts["net"](x)

    def method(self, x):
        return self.parts["net"](x)


def outer(net):
    def inner(x):
        return net(x)

    return lambda x: inner(x)


BEHIND = {
    "list": lambda net: (lambda nets: lambda x: nets[0](x))([net]),
    "callable object": Wrapper,
    "method": lambda net: Wrapper(net).method,
    "partial": lambda net: functools.partial(lambda net, x: net(x), net),
    "nested function": outer,
}


@pytest.mark.parametrize("name", BEHIND)
def test_modules_that_a_callable_refers_to_are_in_eval_mode_and_restored(name):
    """Batch norm would count batches and mix samples, and dropout would make the function random."""
    net, x = batch_norm_network().train(), torch.randn(3, 4)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = input_hessian(BEHIND[name](net), x, 0, "prob")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    torch.testing.assert_close(found, input_hessian(net, x, 0, "prob"))


@pytest.mark.parametrize("argument", ["forward_fn", "output_fn", "target"])
def test_modules_of_other_functions_are_in_eval_mode_and_restored(argument):
    net, x, plain = batch_norm_network().train(), torch.randn(3, 4), nn.Linear(4, 4)
    whole = nn.Sequential(plain, net)
    given = {
        "forward_fn": {"forward_fn": lambda model, x: net(model(x))},
        "output_fn": {"output_fn": lambda output: net(output)},
        "target": {"target": lambda z, classes: net(z).gather(1, classes)},
    }[argument]
    before = {key: value.clone() for key, value in net.state_dict().items()}
    found = input_gradient(plain, x, 0, **given)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    torch.testing.assert_close(found, input_gradient(whole, x, 0))


def test_a_callable_leaves_what_it_writes_to():
    seen, calls = [], {"number": 0}

    def model(x):
        seen.append(x)
        calls["number"] += 1
        return x.pow(3).sum(1)

    input_hessian(model, torch.randn(2, 3), 0)
    assert (seen, calls) == ([], {"number": 0})


@pytest.mark.parametrize("name", BEHIND)
def test_modules_that_a_callable_refers_to_are_cast(name):
    """Their parameters are left as they are."""
    net, x = batch_norm_network(), torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = input_hessian(BEHIND[name](net), x, 0, "prob", dtype=torch.float64)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, input_hessian(net, x, 0, "prob", dtype=torch.float64))
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_modules_that_forward_fn_refers_to_are_cast():
    net, first, x = batch_norm_network().eval(), nn.Linear(4, 4), torch.randn(3, 4)
    found = input_hessian(first, x, 0, "prob", dtype=torch.float64, forward_fn=lambda model, x: net(model(x)))
    torch.testing.assert_close(found, input_hessian(nn.Sequential(first, net), x, 0, "prob", dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_term_of_a_function_around_a_network_is_found(seed):
    """In float64, as for a module: in float32, differences of values are not sharp enough."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(40, 16), nn.Tanh(), nn.Linear(16, 3))

    def model(x):
        return net(torch.cat([x[:, :-1], x[:, -1:].detach()], 1))

    for function in (input_gradient, input_hessian):
        with pytest.warns(UserWarning, match="of 3 of 3 samples cannot be trusted"):
            function(model, torch.randn(3, 40), 0)


def test_modules_behind_a_function_are_looked_for_while_no_other_thread_measures(monkeypatch):
    """Which would put them back into train mode meanwhile, and be undone."""
    owned, take = Notes(), StateSnapshot.take

    def noting(*owners):
        owned.append(ONE_AT_A_TIME._is_owned())
        return take(*owners)

    monkeypatch.setattr(StateSnapshot, "take", noting)
    net = batch_norm_network()
    ModelFunction(lambda x: net(x))
    assert list(owned) == [True]
