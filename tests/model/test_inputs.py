"""Inputs and outputs of real models: several inputs, hidden layers, tokens, tuples, many samples."""

import re
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lightning_hessian import ConfigurationError, input_gradient, input_hessian, input_hvp, input_spectrum

F64 = torch.float64


class Forecast(NamedTuple):
    """As the models of forecasting libraries return them."""

    state: Any
    prediction: torch.Tensor
    scale: torch.Tensor


class Two(nn.Module):
    """Takes an image-like and a context vector."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(2, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, image, context):
        return self.head(torch.tanh(self.first(image) * self.second(context)))


def two_inputs():
    return Two().double(), torch.randn(5, 4, dtype=F64), torch.randn(5, 2, dtype=F64)


@pytest.mark.parametrize("chunk_size", ["auto", 3])
def test_one_of_several_inputs_the_others_held(chunk_size):
    net, image, context = two_inputs()
    named = input_hessian(net, {"image": image, "context": context}, "all", wrt="image", chunk_size=chunk_size)
    placed = input_hessian(net, (image, context), "all", wrt=1)
    for n in range(5):
        for k in range(3):
            of_image = torch.func.hessian(lambda v, n=n, k=k: net(v, context[n])[k])(image[n])
            of_context = torch.func.hessian(lambda v, n=n, k=k: net(image[n], v)[k])(context[n])
            torch.testing.assert_close(named[n, k], of_image, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(placed[n, k], of_context, rtol=1e-9, atol=1e-12)


def test_lanczos_and_low_rank_hold_the_other_inputs_too():
    net, image, context = two_inputs()
    inputs = {"image": image, "context": context}
    whole = input_spectrum(net, inputs, [0, 2], wrt="image")
    ends = input_spectrum(net, inputs, [0, 2], wrt="image", method="lanczos")
    torch.testing.assert_close(ends.eigenvalues, whole.eigenvalues, rtol=0, atol=1e-9)

    class Gated(Two):
        def forward(self, image, context):
            return self.head(torch.relu(self.first(image) * self.second(context)))

    gated = Gated().double()
    fast = input_spectrum(gated, inputs, 1, "prob", wrt="image")
    assert fast.method == "low_rank"
    whole = input_spectrum(gated, inputs, 1, "prob", wrt="image", method="dense")
    torch.testing.assert_close(fast.lambda_max, whole.lambda_max)


class Text(nn.Module):
    """Token embeddings, a recurrent layer, two classes; gives an object with logits."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 3)
        self.body = nn.GRU(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens):
        return Output(self.head(self.body(self.embedding(tokens))[0][:, -1]))


@dataclass
class Output:
    logits: torch.Tensor


def test_tokens_are_measured_at_their_embeddings():
    net, tokens = Text().double(), torch.randint(20, (3, 5))
    hessian = input_hessian(net, tokens, 1, wrt="embedding", dtype=F64)
    assert hessian.shape == (3, 1, 15, 15)
    embedded = net.embedding(tokens).detach()

    def logit(v):
        return net.head(net.body(v.reshape(1, 5, 3))[0][:, -1])[0, 1]

    expected = torch.autograd.functional.hessian(logit, embedded[0].flatten())
    torch.testing.assert_close(hessian[0, 0], expected, rtol=1e-8, atol=1e-11)
    with pytest.raises(ConfigurationError, match="wrt='embedding'"):
        input_hessian(net, tokens, 1)
    assert not net.embedding._forward_hooks


@pytest.mark.parametrize(
    ("inputs", "wrt", "sentence"),
    [
        ({"image": torch.zeros(2, 4), "context": torch.zeros(2, 2)}, None, "several inputs .*'image', 'context'.*wrt"),
        ({"image": torch.zeros(2, 4), "context": torch.zeros(2, 2)}, "x", "wrt='x' is neither .*layers: first, second"),
        ((torch.zeros(2, 4), torch.zeros(3, 2)), 0, r"first dimensions are \[2, 3\].*forward_fn"),
    ],
)
def test_what_cannot_be_differentiated_raises(inputs, wrt, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        input_gradient(Two(), inputs, 0, wrt=wrt)


def test_a_layer_that_gives_no_tensor():
    with pytest.raises(ConfigurationError, match=r"wrt='body' must run once and return a tensor; .* returned tuple"):
        input_gradient(Text(), torch.randint(20, (3, 5)), 0, wrt="body")


@pytest.mark.parametrize("wrapped", [Output, lambda z: {"loss": None, "logits": z}])
def test_outputs_under_the_name_logits_need_no_output_fn(wrapped):
    net, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(2, 4, dtype=F64)
    assert torch.equal(input_hessian(lambda x: wrapped(net(x)), x, [0, 2]), input_hessian(net, x, [0, 2]))


def test_an_output_fn_sees_what_the_model_returned():
    net, x = nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=F64)
    gradient = input_gradient(lambda x: Output(net(x)), x, 0, output_fn=lambda o: 2 * o.logits)
    torch.testing.assert_close(gradient, 2 * input_gradient(net, x, 0))


def test_outputs_of_a_regression_are_looked_at_as_classes():
    """Outputs (½ xᵀQx, bᵀx, Σ x³/6) have the Hessians Q, 0 and diag x."""
    q, b = torch.tensor([[2.0, 1.0], [1.0, -3.0]], dtype=F64), torch.tensor([1.0, 2.0], dtype=F64)

    def three(x):
        return torch.stack([((x @ q) * x).sum(1) / 2, x @ b, (x**3).sum(1) / 6], dim=1)

    x = torch.randn(4, 2, dtype=F64)
    hessians = input_hessian(three, x, [0, 1, 2])
    expected = torch.stack([q.expand(4, 2, 2), torch.zeros(4, 2, 2, dtype=F64), torch.diag_embed(x)], dim=1)
    torch.testing.assert_close(hessians, expected, rtol=0, atol=1e-12)
    alone = input_hessian(lambda x: three(x)[:, 2], x, 0)
    torch.testing.assert_close(alone, expected[:, 2:], rtol=0, atol=1e-12)


def test_outputs_that_are_classes():
    with pytest.raises(ConfigurationError, match=r"returned torch\.int64, which has no derivative"):
        input_hessian(lambda x: x.argmax(1, keepdim=True), torch.rand(2, 3), 0)


def test_pixels_of_a_segmentation_and_steps_of_a_sequence():
    net, x = nn.Conv2d(1, 2, 3, padding=1).double(), torch.randn(2, 1, 4, 4, dtype=F64)
    gradient = input_gradient(net, x, [0, 1], output_fn=lambda o: o[:, :, 1, 2])
    assert gradient.shape == (2, 2, 16)
    torch.testing.assert_close(gradient[0, 1].reshape(4, 4)[0:3, 1:4], net.weight[1, 0].detach())


def test_a_hundred_thousand_points_of_two_inputs():
    """The Laplacian of u = sin(a) sin(b) is −2u: what a physics-informed network asks for."""
    x = torch.rand(100_000, 2, dtype=F64) * 3

    def u(x):
        return torch.sin(x[:, 0]) * torch.sin(x[:, 1])

    spectrum = input_spectrum(u, x, 0)
    torch.testing.assert_close(spectrum.trace[:, 0], -2 * u(x), rtol=0, atol=1e-10)
    product = input_hvp(u, x, torch.tensor([1.0, 0.0]), 0)
    torch.testing.assert_close(product[:, 0, 0], -u(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("wrapped", "advice"),
    [
        (lambda z: z[:, None].expand(-1, 5, -1), "output[:, -1]"),
        (lambda z: z[:, :, None, None].expand(-1, -1, 2, 2), "output[:, :, 1, 1]"),
        (lambda z: {"scores": z}, "output['scores']"),
        (lambda z: (z, None), "output[0]"),
        (lambda z: (None, z), "output[1]"),
        (lambda z: {"loss": z.sum(), "pred": z[:, None].expand(-1, 5, -1)}, "output['pred'][:, -1]"),
        (lambda z: Forecast(None, z[:, None], z), "output.prediction[:, -1]"),
        (lambda z: torch.distributions.Normal(z, 1.0), "output.mean"),
        (lambda z: z[:, None].expand(-1, 5, -1).reshape(-1, 3), "output.reshape(-1, 5, 3)[:, -1]"),
        (lambda z: SimpleNamespace(_private=z, state=None, score=z), "output.score"),
    ],
)
def test_the_message_shows_an_output_fn_that_may_fit(wrapped, advice):
    net = nn.Linear(4, 3)
    with pytest.raises(ConfigurationError, match=re.escape(f"for example output_fn=lambda output: {advice}.")):
        input_gradient(lambda x: wrapped(net(x)), torch.randn(2, 4), 0)


def test_layers_of_the_name_asked_for_are_listed_first():
    deep = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4)) for _ in range(9)])
    deep.add_module("head", nn.ModuleDict({"embedding": nn.Linear(4, 4)}))
    with pytest.raises(ConfigurationError, match=r"layers: head.embedding, 0, 0.0"):
        input_gradient(deep, torch.randn(2, 4), 0, wrt="embedding")


def test_the_message_says_how_to_keep_a_whole_forecast():
    keeps = re.escape("output.prediction.flatten(1) keeps all entries of a sample as outputs.")
    with pytest.raises(ConfigurationError, match=keeps):
        input_gradient(lambda x: Forecast(None, x[:, None], x), torch.randn(2, 4), 0)


@pytest.mark.parametrize(
    ("output_fn", "returned"),
    [
        (lambda z: z[:, None], r"a tensor of shape \(2, 1, 4\) for 2 samples; it must return \[N, C\] or \[N\]"),
        (lambda z: z.argmax(1), "torch.int64, which has no derivative"),
        (lambda z: z + 1j, "complex numbers"),
    ],
)
def test_outputs_that_an_output_fn_got_wrong(output_fn, returned):
    with pytest.raises(ConfigurationError, match=f"^output_fn returned {returned}"):
        input_gradient(lambda x: x, torch.randn(2, 4), 0, output_fn=output_fn)


def test_an_output_fn_that_fails_is_named():
    named = (
        r"output_fn failed with AttributeError: .*'output'.* here Forecast with output.prediction \[2, 1, 4\], output"
    )
    with pytest.raises(ConfigurationError, match=named):
        input_gradient(lambda x: Forecast(None, x[:, None], x), torch.randn(2, 4), 0, output_fn=lambda o: o.output)


@pytest.mark.parametrize("function", [input_gradient, input_hessian, input_spectrum])
@pytest.mark.parametrize(
    ("x", "wrt"), [(torch.zeros(2, 0), None), (torch.zeros(2, 3, 0), None), ((torch.zeros(2, 0), torch.zeros(2, 3)), 0)]
)
def test_samples_without_entries(function, x, wrt):
    def model(*inputs):
        return sum(each.flatten(1).sum(1) for each in inputs)

    with pytest.raises(ConfigurationError, match=r"shape \(2,.* 0\): its samples have no entries"):
        function(model, x, 0, wrt=wrt)


@pytest.mark.parametrize(
    ("num_outputs", "sentence"),
    [(1, "a single output per sample, so the only class is 0"), (3, "3 outputs per sample, so classes go from 0 to 2")],
)
def test_classes_that_a_model_does_not_have(num_outputs, sentence):
    with pytest.raises(ConfigurationError, match=rf"values from 0 to 3, is out of range: the model has {sentence}\."):
        input_gradient(nn.Linear(4, num_outputs), torch.randn(2, 4), torch.tensor([0, 3]))
