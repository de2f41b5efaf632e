"""The Jacobian of the outputs: from one forward pass, and right where batched backward passes are wrong."""

import torch
from support.counting import Noting
from support.networks import mlp
from torch import nn

from lightning_hessian.curvature.operators.gauss_newton import (
    factored_gauss_newton,
    gauss_newton_hessians,
    jacobian,
    outputs_with_jacobian,
)
from lightning_hessian.curvature.target_batch import TargetBatch

F64 = torch.float64


def batch_of(net, num_samples=3, inputs=6, classes=(0, 2)):
    x = torch.randn(num_samples, inputs, dtype=F64)
    return TargetBatch(net, lambda z, c: z.softmax(1).gather(1, c), x, torch.tensor([classes] * num_samples))


def expected_jacobian(net, x):
    return torch.stack([torch.func.jacrev(net)(sample) for sample in x])


def test_one_forward_pass():
    net = Noting(mlp())
    batch = batch_of(net)
    outputs, found = outputs_with_jacobian(batch)
    assert len(net.sizes) == 1
    torch.testing.assert_close(outputs, net.net(batch.x).detach())
    torch.testing.assert_close(found, expected_jacobian(net.net, batch.x))
    net.sizes.clear()
    gauss_newton_hessians(batch)
    assert len(net.sizes) == 1


class LyingUnderVmap(torch.autograd.Function):
    """The identity, whose batched backward pass gives twice the gradient."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return Twice.apply(gradient)


class Twice(torch.autograd.Function):
    """The identity, and twice that under ``vmap``."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def vmap(info, in_dims, x):
        return 2 * x, in_dims[0]


def test_a_wrong_vmap_rule_is_noticed():
    net = mlp()
    batch = batch_of(lambda x: net(LyingUnderVmap.apply(x)))
    torch.testing.assert_close(jacobian(batch), expected_jacobian(net, batch.x))


def test_outputs_that_do_not_depend_on_the_input():
    batch = batch_of(lambda x: torch.ones(len(x), 3, dtype=F64))
    outputs, found = outputs_with_jacobian(batch)
    assert outputs.shape == (3, 3)
    assert found.shape == (3, 3, 6)
    assert not found.any()


def test_the_factored_product_and_norm_are_those_of_the_matrix():
    batch = batch_of(mlp(nn.Tanh))
    term, whole = factored_gauss_newton(batch), gauss_newton_hessians(batch).flatten(0, 1)
    v = torch.randn(6, 4, 6, dtype=F64)
    torch.testing.assert_close(term.apply(v), v @ whole)
    torch.testing.assert_close(term.norm, torch.linalg.matrix_norm(whole))
