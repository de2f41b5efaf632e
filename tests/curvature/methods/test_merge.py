"""Parts of a measurement become one, also where memory let one of them keep more eigenvectors."""

from dataclasses import replace

import torch
from support.networks import mlp
from torch import nn

from lightning_hessian import input_spectrum
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.methods.execute import Measurement
from lightning_hessian.curvature.methods.merge import joined
from lightning_hessian.curvature.methods.plan import Plan


def test_the_largest_eigenvectors_that_all_parts_have_are_kept():
    net, x = mlp(nn.ReLU), torch.randn(3, 6)
    whole = input_spectrum(net, x.double(), [0, 2], "prob")
    parts = [input_spectrum(net, x[s].double(), [0, 2], "prob") for s in (slice(0, 2), slice(2, 3))]
    fewer = replace(
        parts[0], eigenvectors=parts[0].eigenvectors[:, :, :1], vector_index=parts[0].vector_index[:, :, :1]
    )
    plan = Plan("low_rank", "asked for")
    both = [Measurement(part, None, plan) for part in (fewer, parts[1])]
    found = joined(both, whole.diagnosis, Meter(x.device)).spectrum
    assert found.eigenvectors.shape == (3, 2, 1, 6)
    torch.testing.assert_close(found.vector_index, whole.vector_index[:, :, :1])
    torch.testing.assert_close(found.eigenvalues, whole.eigenvalues)
