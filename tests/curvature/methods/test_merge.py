"""Measurements of groups of samples become one, also where memory allowed one of them more eigenvectors."""

from dataclasses import replace

import torch
from support.networks import measure, mlp
from torch import nn

from lightning_hessian import input_spectrum
from lightning_hessian.curvature.checks.verdict import unchecked
from lightning_hessian.curvature.meter import Meter
from lightning_hessian.curvature.methods.execute import Measurement
from lightning_hessian.curvature.methods.merge import merged, on_cpu
from lightning_hessian.curvature.methods.plan import Plan
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch


def test_the_largest_eigenvectors_that_all_groups_have_are_returned():
    net, x = mlp(nn.ReLU), torch.randn(3, 6)
    whole = input_spectrum(net, x.double(), [0, 2], "prob")
    first, second = (input_spectrum(net, x[s].double(), [0, 2], "prob") for s in (slice(0, 2), slice(2, 3)))
    fewer = replace(first, eigenvectors=first.eigenvectors[:, :, :1], vector_index=first.vector_index[:, :, :1])
    plan = Plan("low_rank", "asked for", whole.diagnosis)
    both = [
        Measurement(
            spectrum, None, plan, unchecked(TargetBatch(net, max, x[: len(spectrum.valid)], x)).passed_on(None, ())
        )
        for spectrum in (fewer, second)
    ]
    found = merged(both, Meter(x.device)).spectrum
    assert found.eigenvectors.shape == (3, 2, 1, 6)
    torch.testing.assert_close(found.vector_index, whole.vector_index[:, :, :1])
    torch.testing.assert_close(found.eigenvalues, whole.eigenvalues)


def test_matrices_and_densities_are_merged_and_a_single_measurement_is_not_copied():
    net, x = mlp(nn.Tanh), torch.randn(5, 6, dtype=torch.float64)
    batch = TargetBatch(net, lambda z, c: z.gather(1, c), x, torch.zeros(5, 1, dtype=torch.long))
    options = Options(method="lanczos", num_eigenvalues=2, density_vectors=2)
    groups = [measure(batch.select(s), "logit", options, n) for s, n in ((slice(0, 3), 2), (slice(3, 5), 0))]
    found = merged(groups, Meter(x.device))
    assert torch.equal(found.hessian, groups[0].hessian)
    for name in ("nodes", "weights"):
        both = [getattr(group.spectrum.density, name) for group in groups]
        assert torch.equal(getattr(found.spectrum.density, name), torch.cat(both))
    assert found.spectrum.cost.num_matvecs == max(group.spectrum.cost.num_matvecs for group in groups)
    single = merged([groups[0]], Meter(x.device))
    for name in ("eigenvalues", "eigenvectors", "diagonal", "gradient"):
        assert getattr(single.spectrum, name) is getattr(groups[0].spectrum, name)
    assert single.hessian is groups[0].hessian
    assert single.spectrum.density is groups[0].spectrum.density
    assert on_cpu(single).spectrum.eigenvalues.data_ptr() == single.spectrum.eigenvalues.data_ptr()


def test_matrices_that_one_group_has_dropped_end_those_of_all():
    """They are those of the first samples: none may follow a gap."""
    net, x = mlp(nn.Tanh), torch.randn(3, 6, dtype=torch.float64)
    batch = TargetBatch(net, lambda z, c: z.gather(1, c), x, torch.zeros(3, 1, dtype=torch.long))
    groups = [measure(batch.select(slice(i, i + 1)), "logit", Options(), 1) for i in range(3)]
    dropped = [replace(m, hessian=None) for m in groups]
    meter = Meter(x.device)
    assert len(merged(groups, meter).hessian) == 3
    assert torch.equal(merged([groups[0], dropped[1], groups[2]], meter).hessian, groups[0].hessian)
    assert merged([dropped[0], *groups[1:]], meter).hessian is None
