"""Bad input gets a sentence that says what was given and what to do."""

from pathlib import Path

import pytest
import torch
from support.networks import mlp
from torch import nn

import lightning_hessian
from lightning_hessian import input_gradient, input_hessian, input_hvp, input_spectrum
from lightning_hessian.errors import ConfigurationError, MeasurementError

X = torch.zeros(2, 6, dtype=torch.float64)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"classes": 3}, r"classes=3 is out of range: the model has 3 outputs .* from 0 to 2"),
        ({"classes": -1}, "out of range"),
        ({"classes": "some"}, "classes='some' is not known"),
        ({"classes": 0.5}, "must contain at least one integer, and only integers"),
        ({"classes": []}, "at least one"),
        ({"classes": [2, 0, 2]}, r"classes=\[2, 0, 2\] lists 2 more than once"),
        ({"x": X.numpy()}, r"holds no tensor: .* torch.as_tensor\(x\)"),
        ({"seed": 0.5}, "seed=0.5 must be a whole number"),
        ({"classes": torch.tensor([0, 1, 2])}, r"with N = 2; got \(3,\).*list of ints"),
        ({"target": "logits"}, "target='logits' is not known.*'logit'"),
        ({"target": lambda z, c: z}, r"returned \(2, 3\).*must return one scalar per sample and class"),
        ({"x": torch.zeros(6)}, r"got shape \(6,\).*unsqueeze"),
        ({"x": torch.zeros(2, 6, dtype=torch.long)}, "torch.int64.*floating point.*wrt='embedding'"),
        ({"x": torch.zeros(2, 6, dtype=torch.uint8)}, r"torch.uint8.*x.float\(\) / 255"),
        ({"x": torch.zeros(2, 6, dtype=torch.bool)}, r"torch.bool.* Give x.float\(\)\.$"),
        ({"x": torch.zeros(2, 6, dtype=torch.complex64)}, r"torch.complex64.*parts, torch.view_as_real\(x\)"),
        ({"classes": torch.tensor([9, 0])}, r"classes, which has values from 0 to 9, is out of range: .* 3 outputs"),
        ({"classes": "label"}, "classes='label' is not known"),
        ({"dtype": torch.float16}, "torch.float32 or torch.float64"),
        ({"chunk_size": 0}, "chunk_size=0 must be a whole number of at least 1"),
        ({"max_memory": 100}, "more than the 100 bytes.*max_memory"),
    ],
)
def test_input_hessian_raises(arguments, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        input_hessian(mlp(), **{"x": X, "classes": 0, **arguments})


def test_outputs_of_another_shape():
    with pytest.raises(ConfigurationError, match=r"shape \(2, 3, 1\).*output_fn"):
        input_gradient(lambda x: mlp()(x).unsqueeze(-1), X, 0)


class Own:
    """Not a tensor, and holds none under a name that is known."""


@pytest.mark.parametrize(
    ("returned", "sentence"),
    [
        (lambda z: (z, None), r"returned tuple of 2 for 2 samples.*lambda output: output\[0\]\."),
        (lambda z: {"y": z, "aux": z}, r"returned dict with the keys \['y', 'aux'\].*lambda output: output\['y'\]\."),
        (
            lambda z: z[:, :, None, None].expand(-1, -1, 4, 4),
            r"\(2, 3, 4, 4\).*output: output\[:, :, 2, 2\]\. output\.flatten\(1\) keeps",
        ),
        (lambda z: z[:, None].expand(-1, 5, -1), r"\(2, 5, 3\).*lambda output: output\[:, -1\]\."),
        (lambda z: {"logits": z[:, None]}, r"output\['logits'\] of shape \(2, 1, 3\).*output\['logits'\]\[:, -1\]\."),
        (lambda z: Own(), r"returned Own for 2 samples"),
        (lambda z: {}, r"returned dict with the keys \[\]"),
        (lambda z: z.sum(), r"shape \(\) for 2 samples.*and returns \[N, C\]\.$"),
    ],
)
def test_outputs_of_another_kind_show_the_output_fn_that_fits(returned, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        input_gradient(lambda x: returned(mlp()(x)), X, 0)


def test_output_fn_and_forward_fn_fix_it():
    net = mlp()
    expected = input_gradient(net, X, 1)
    assert torch.equal(input_gradient(lambda x: {"y": net(x)}, X, 1, output_fn=lambda o: o["y"]), expected)
    assert torch.equal(input_gradient(net, X, 1, forward_fn=lambda module, x: module(x)), expected)


@pytest.mark.parametrize("target", ["prob", "log_prob", "loss", "margin"])
def test_one_output_has_no_others_to_compare_with(target):
    with pytest.raises(ConfigurationError, match=r"one output per sample.*'logit'"):
        input_hessian(lambda x: x.sum(1), X, 0, target)


def test_a_vector_of_the_wrong_shape():
    with pytest.raises(ConfigurationError, match=r"v has shape \(5,\).*\(2, 1, 6\)"):
        input_hvp(mlp(), X, torch.zeros(5), 0)


def test_too_little_memory_for_one_sample():
    with pytest.raises(
        MeasurementError,
        match=r"method='dense' needs .* one sample of 1 class \(D = 6\).*100 bytes may be used. Allow max_memory=\d+",
    ):
        input_spectrum(mlp(), X, 0, max_memory=100)


def test_nan_is_not_a_number():
    net = mlp()
    nn.init.constant_(net[0].weight, float("nan"))
    with pytest.raises(MeasurementError, match="Values of the target are not finite at samples 0 and 1"):
        input_hessian(net, X, 0)
    with pytest.warns(UserWarning, match="1 of 2 samples cannot be trusted. Inputs are not finite at sample 1"):
        found = input_hessian(mlp(), torch.stack([X[0], X[1] / 0]), 0)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()


def test_an_unknown_method():
    with pytest.raises(ConfigurationError, match="method='magic' is not known"):
        input_spectrum(mlp(), X, 0, method="magic")


def test_every_warning_is_one_that_a_measurement_lets_through():
    package = Path(lightning_hessian.__file__).parent
    direct = {str(file.relative_to(package)) for file in package.rglob("*.py") if "warnings.warn(" in file.read_text()}
    assert direct == {"errors.py"}
