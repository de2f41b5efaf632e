"""What the method ``lanczos`` makes of its products, and how few it needs."""

import pytest
import torch
from support.counting import Noting
from support.networks import mlp
from torch import nn

from lightning_hessian import input_hessian
from lightning_hessian.curvature.algorithms.hutchinson import NUM_VECTORS
from lightning_hessian.curvature.algorithms.lanczos import lanczos
from lightning_hessian.curvature.methods.lanczos import RELATIVE_TOLERANCE, lanczos_decomposition
from lightning_hessian.curvature.operators.autodiff import gradients
from lightning_hessian.curvature.operators.hessian import HessianOperator
from lightning_hessian.curvature.options import Options
from lightning_hessian.curvature.target_batch import TargetBatch
from lightning_hessian.model.targets import resolve_target

F32, F64 = torch.float32, torch.float64


def problems(net, x, classes, target="logit", num_outputs=3):
    return TargetBatch(net, resolve_target(target, num_outputs), x, torch.tensor([classes] * len(x)))


def network(dtype=F64, inputs=200):
    torch.manual_seed(0)
    return mlp(nn.Tanh, inputs=inputs, width=40).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("target", ["logit", "prob"])
@pytest.mark.parametrize(("classes", "more"), [([1], 1), ([0, 1, 2], 2)])
def test_every_product_beyond_the_basis(dtype, target, classes, more):
    """Random vectors, the gradient, and one for the prediction of several classes; no others."""
    options = Options(num_eigenvalues=6)
    batch = problems(network(dtype), torch.randn(4, 200, dtype=dtype), classes, target)
    basis = lanczos(
        HessianOperator(batch), 6, generator=options.generator(), relative_tolerance=RELATIVE_TOLERANCE[dtype]
    )
    products = []
    found = lanczos_decomposition(batch, gradients(batch), options, count=lambda: products.append(1))
    assert found.decomposition.converged.all()
    assert len(products) == basis.num_matvecs + NUM_VECTORS + more


def test_forward_passes():
    net = Noting(network())
    batch = problems(net, torch.randn(4, 200, dtype=F64), [1])
    gradient = gradients(batch)
    net.sizes.clear()
    lanczos_decomposition(batch, gradient, Options(num_eigenvalues=6))
    assert sum(net.sizes) <= 4 + 2  # a graph of the half that takes longer; that A = 0 follows from the outputs
    assert 1 not in net.sizes


@pytest.mark.parametrize("target", ["logit", "prob"])
@pytest.mark.parametrize("classes", [[1], [0, 2]])
def test_the_prediction_is_what_the_whole_hessian_says(target, classes):
    net, x = network(), torch.randn(3, 200, dtype=F64)
    batch = problems(net, x, classes, target)
    gradient = gradients(batch)
    prediction = lanczos_decomposition(batch, gradient, Options(num_eigenvalues=6)).prediction
    w = prediction.direction
    expected = torch.einsum("nd,nkde,ne->nk", w, input_hessian(net, x, classes, target), w)
    scale = float(prediction.spectral_norm.max())
    torch.testing.assert_close(prediction.curvature, expected, rtol=0, atol=1e-4 * scale)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(3, dtype=F64))


def test_the_prediction_where_the_gradient_is_the_top_eigenvector():
    """Of Σ a_i x_i⁴ at points on the first axis: three vectors that span two dimensions."""
    a = torch.tensor([3.0, *(0.9**i for i in range(59))], dtype=F64)
    x = torch.zeros(2, 60, dtype=F64)
    x[:, 0] = torch.tensor([1.0, 2.0])
    batch = TargetBatch(lambda x: (x**4 * a).sum(1, keepdim=True), lambda z, c: z, x, torch.zeros(2, 1).long())
    prediction = lanczos_decomposition(batch, gradients(batch), Options(num_eigenvalues=2)).prediction
    expected = 12 * (a[0] * x[:, 0] ** 2 * prediction.direction[:, 0] ** 2).unsqueeze(1)
    torch.testing.assert_close(prediction.curvature, expected)


@pytest.mark.parametrize("classes", [[0], [0, 1]])
def test_a_sample_whose_hessian_is_not_finite_leaves_the_others_alone(classes):
    """The norm at 0 has a gradient and a Hessian of 0/0."""
    net = network(inputs=90)

    def function(x):
        return net(x) + x.norm(dim=1, keepdim=True) ** 2

    x = torch.randn(4, 90, dtype=F64)
    x[1] = 0
    options = Options(num_eigenvalues=4, density_vectors=2)
    batch, others = (problems(function, samples, classes, "prob") for samples in (x, x[[0, 2, 3]]))
    found = lanczos_decomposition(batch, gradients(batch), options)
    expected = lanczos_decomposition(others, gradients(others), options)
    for name in ("eigenvalues", "residuals", "trace", "trace_error", "frobenius_norm", "functional_norm", "diagonal"):
        value = getattr(found.decomposition, name)
        assert value[1].isnan().all(), name
        assert value[[0, 2, 3]].isfinite().all()
    for name, right in vars(expected.decomposition).items():
        value = getattr(found.decomposition, name)
        if name == "eigenvalues":
            bound = expected.decomposition.residuals
        elif f"{name}_error" in vars(expected.decomposition):  # they may stop one step apart, and know another space
            bound = 4 * getattr(expected.decomposition, f"{name}_error") + 1e-9
        else:
            continue
        assert ((value[[0, 2, 3]] - right).abs() <= bound).double().mean() > 0.98, name
    assert not found.decomposition.converged[1].any()
    assert found.decomposition.converged[[0, 2, 3]].all()
    assert found.decomposition.density.nodes[1].isnan().all()
    assert found.decomposition.density.nodes[[0, 2, 3]].isfinite().all()
    assert found.prediction.curvature[[0, 2, 3]].isfinite().all()


def test_batch_norm_before_a_change_of_layout_never_in_a_batch_of_one():
    """PyTorch's backward of batch norm in eval mode is wrong there on the CPU; residuals are those of the vectors."""
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    first = nn.Sequential(convolution, norm).eval().requires_grad_(False)
    head = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).requires_grad_(False)
    net = Noting(lambda x: head(first(x).flatten(2).permute(0, 2, 1)).mean(1))
    x = torch.randn(2, 3, 8, 8)
    x[1] *= 0.01
    batch = problems(net, x, [0])
    found = lanczos_decomposition(batch, gradients(batch), Options(num_eigenvalues=4)).decomposition
    assert 1 not in net.sizes
    vectors, values = found.eigenvectors[:, 0], found.eigenvalues.gather(2, found.vector_index)[:, 0]
    operator = HessianOperator(batch)
    for i in range(4):
        residual = (operator.matvec(vectors[:, i]) - values[:, i : i + 1] * vectors[:, i]).norm(dim=1)
        claimed = found.residuals.gather(2, found.vector_index)[:, 0, i]
        assert (residual <= 1.5 * claimed + 1e-6 * values.abs().amax(1)).all()
