"""Input Hessians as operators: against whole matrices in closed form, and handed to other libraries."""

import gc
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from support.counting import Notes
from support.networks import custom_function, mlp
from torch import nn

from lightning_hessian import (
    ConfigurationError,
    MeasurementError,
    input_gradient,
    input_hessian,
    input_hessian_operator,
    input_spectrum,
)
from lightning_hessian.model.function import ModelFunction
from lightning_hessian.model.isolation import ONE_AT_A_TIME

F64 = torch.float64


def quadratic(q):
    """Two outputs, ½ xᵀ Q x and its negative."""

    def model(x):
        value = 0.5 * torch.einsum("ni,ij,nj->n", x, q.to(x), x)
        return torch.stack([value, -value], dim=1)

    return model


@pytest.fixture
def q():
    a = torch.randn(7, 7, dtype=F64)
    return (a + a.T) / 2


@pytest.fixture
def operator(q):
    with input_hessian_operator(quadratic(q), torch.randn(3, 7, dtype=F64), [0, 1]) as hessian:
        yield hessian


def test_shape_dtype_and_device(operator):
    assert operator.shape == (3, 2, 7, 7)
    assert (operator.dtype, operator.device.type) == (F64, "cpu")
    assert (operator[1, 0].shape, operator[1, 0].dtype) == ((7, 7), F64)
    assert repr(operator) == "InputHessianOperator(shape=(3, 2, 7, 7), dtype=torch.float64, device=cpu)"


def test_products_have_the_shapes_of_matmul(operator, q):
    whole = torch.stack([q, -q]).expand(3, -1, -1, -1)
    for shape in ((7,), (7, 4), (2, 7, 4), (3, 1, 7, 4), (3, 2, 7, 4), (7, 0)):
        v = torch.randn(shape, dtype=F64)
        torch.testing.assert_close(operator @ v, whole @ v)
    v = torch.randn(3, 2, 7, dtype=F64)
    torch.testing.assert_close(operator.matvec(v), (whole @ v.unsqueeze(-1)).squeeze(-1))


def test_one_sample_and_class(operator, q):
    v = torch.randn(7, 3, dtype=F64)
    torch.testing.assert_close(operator[2, 1] @ v, -q @ v)
    torch.testing.assert_close(operator[-1, 0] @ v[:, 0].numpy(), q @ v[:, 0])
    torch.testing.assert_close(operator[0, 0].matvec(v[:, 0].float()), q @ v[:, 0].float().double())


def test_classes_are_named_by_their_number(q):
    x = torch.randn(2, 7, dtype=F64)
    v = torch.randn(7, dtype=F64)
    with input_hessian_operator(quadratic(q), x, torch.tensor([1, 0])) as hessian:
        torch.testing.assert_close(hessian[0, 1] @ v, -q @ v)
        torch.testing.assert_close(hessian[1, 0] @ v, q @ v)
        with pytest.raises(IndexError, match=r"Class 0 is not looked at for sample 0: .* one of \[1\]"):
            hessian[0, 0]
        with pytest.raises(IndexError, match=r"There is no sample 2: .* from 0 to 1"):
            hessian[2, 0]
        with pytest.raises(IndexError, match=r"H\[sample, class_id\]"):
            hessian[0]


def test_indices_of_numpy_and_what_is_no_index(operator, q):
    v = torch.randn(7, dtype=F64)
    torch.testing.assert_close(operator[np.int64(1), torch.tensor(0)] @ v, q @ v)
    with pytest.raises(TypeError):
        list(operator)
    with pytest.raises(ConfigurationError, match="of real numbers"):
        operator @ (v + 1j * v)


def test_buffers_are_those_of_the_opening():
    network = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.GELU(), nn.Linear(6, 2)).double()
    x, v = torch.randn(3, 4, dtype=F64), torch.randn(4, dtype=F64)
    with input_hessian_operator(network, x, 0) as hessian:
        before = hessian @ v
        network.train()(5 + torch.randn(8, 4, dtype=F64))
        torch.testing.assert_close(hessian[1, 0] @ v, before[1, 0])


@pytest.mark.parametrize("shape", [(), (6,), (6, 2), (3, 7), (5, 2, 7, 3)])
def test_other_vectors_are_refused(operator, shape):
    with pytest.raises(ConfigurationError, match="do not fit an operator of shape"):
        operator @ torch.randn(shape, dtype=F64)


def test_trace_and_diagonal_exactly(operator, q):
    trace, diagonal = operator.trace(7), operator.diagonal(100)
    torch.testing.assert_close(trace.value, torch.stack([q.trace(), -q.trace()]).expand(3, -1))
    torch.testing.assert_close(diagonal.value, torch.stack([q.diag(), -q.diag()]).expand(3, -1, -1))
    assert trace.error.max() < 1e-13
    assert operator._blocks._rows.numel() == 7 * 6  # of the exact estimates, D vectors of each, and no more
    assert operator[1, 1].trace(7).value == -operator[1, 0].trace(7).value


def test_trace_and_diagonal_are_estimated_with_standard_errors():
    a = torch.randn(200, 200, dtype=F64)
    q = (a + a.T) / 2
    within = []
    for seed in range(3):
        with input_hessian_operator(quadratic(q), torch.randn(1, 200, dtype=F64), 0, seed=seed) as hessian:
            trace, diagonal = hessian.trace(), hessian[0, 0].diagonal()
        assert trace.error < 0.5 * q.norm()
        assert (trace.value - q.trace()).abs() < 3 * trace.error
        within.append(((diagonal.value - q.diag()).abs() < 2 * diagonal.error).double().mean())
    assert min(within) > 0.9  # Student's t with 31 degrees of freedom: 0.946


def test_gauss_newton_term():
    network = mlp(outputs=4)
    x = torch.randn(2, 6, dtype=F64)
    j = torch.autograd.functional.jacobian(lambda x: network(x).sum(0), x).permute(1, 0, 2)
    p = network(x).softmax(1).detach()
    v = torch.randn(6, dtype=F64)
    with input_hessian_operator(network, x, 2, "log_prob") as hessian:
        found = hessian.gauss_newton @ v
        assert hessian.gauss_newton[1, 2].shape == (6, 6)
    for n in range(2):
        a = -(torch.diag(p[n]) - torch.outer(p[n], p[n]))
        torch.testing.assert_close(found[n, 0], j[n].T @ a @ j[n] @ v)


def test_scipy_finds_both_ends_of_the_spectrum(operator, q):
    from scipy.sparse.linalg import eigsh

    expected = torch.linalg.eigvalsh(q)
    values, vectors = eigsh(operator.to_scipy(1, 0), k=2, which="BE")
    torch.testing.assert_close(torch.tensor(values), expected[[0, -1]])
    torch.testing.assert_close(q @ torch.tensor(vectors), torch.tensor(vectors) * torch.tensor(values))
    linear = operator[0, 1].to_scipy()
    assert (linear @ torch.eye(7, dtype=F64).numpy()).shape == (7, 7)
    torch.testing.assert_close(torch.tensor(linear.rmatmat(torch.eye(7, dtype=F64).numpy())), -q)


def test_another_library_finds_the_top_eigenvalue(operator, q):
    eigenthings = pytest.importorskip("hessian_eigenthings")
    found = eigenthings.lanczos(
        eigenthings.LambdaOperator(operator[0, 0].matvec, 7, dtype=F64), k=1, max_iter=7, which="LA", seed=0
    )
    torch.testing.assert_close(found.eigenvalues[0].to(F64), torch.linalg.eigvalsh(q)[-1])


def test_what_the_functions_give(operator, q):
    x = torch.randn(2, 7, dtype=F64)
    with input_hessian_operator(quadratic(q), x, 0) as hessian:
        torch.testing.assert_close(hessian.to_dense(), q.expand(2, 1, 7, 7))
        torch.testing.assert_close(hessian.gradient(), (x @ q).unsqueeze(1))
        torch.testing.assert_close(hessian.hvp(x), (x @ q).unsqueeze(1))
        expected = input_spectrum(quadratic(q), x, 0).eigenvalues
        assert torch.equal(hessian.spectrum().eigenvalues, expected)


def test_the_network_runs_forward_once_for_many_products():
    counting = Counting()
    x = torch.randn(2, 5)
    with input_hessian_operator(counting, x, 0, check=False) as hessian:
        assert len(counting.calls) == 1  # at the opening
        hessian @ torch.randn(5)
        before = len(counting.calls)
        assert before == 2
        for _ in range(4):
            hessian @ torch.randn(5)
        assert len(counting.calls) == before


def test_a_graph_is_kept_however_large_as_long_as_it_fits(monkeypatch):
    """What is worked on at a time elsewhere is less than what fits the memory."""
    monkeypatch.setattr("lightning_hessian.curvature.cost_model.GROUP_BYTES", 1)
    counting = Counting()
    with input_hessian_operator(counting, torch.randn(6, 5), [0, 1], check=False) as hessian:
        for term in (hessian, hessian.gauss_newton):
            term @ torch.randn(5)
            before = len(counting.calls)
            for _ in range(4):
                term @ torch.randn(5)
            assert len(counting.calls) == before


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(inputs=5)
        self.calls = Notes()

    def forward(self, x):
        self.calls.append(len(x))
        return self.net(x)


def test_products_fit_the_memory(q):
    """Vectors and problems are grouped, and the results are the same."""
    network, x, v = mlp(outputs=4), torch.randn(5, 6, dtype=F64), torch.randn(6, 9, dtype=F64)
    with input_hessian_operator(network, x, [0, 3]) as hessian:
        expected = hessian @ v
    with input_hessian_operator(network, x, [0, 3], max_memory=20_000) as hessian:
        torch.testing.assert_close(hessian @ v, expected)
        assert hessian._blocks._rows_at_once(hessian._kind) < 10


def test_the_model_is_free_between_products(q):
    """Its mode, the random streams and its parameters are the user's; the operator is that of the opening."""
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.GELU(), nn.Linear(8, 2))
    network.train()
    x, v = torch.randn(2, 4), torch.randn(4)
    with input_hessian_operator(network, x, 0) as hessian:
        before = hessian @ v
        drawn = torch.rand(3)
        assert network.training
        assert network[0].weight.requires_grad
        with torch.no_grad():
            network[0].weight.zero_()
        with torch.inference_mode():
            assert torch.equal(hessian @ v, before)
        assert not torch.equal(torch.rand(3), drawn)


def test_a_closed_operator_says_so(operator):
    with input_hessian_operator(mlp(inputs=4), torch.randn(1, 4), 0) as hessian:
        one, term = hessian[0, 0], hessian.gauss_newton
    for closed in (hessian, one, term):
        with pytest.raises(ConfigurationError, match="inside of its with block"):
            closed @ torch.randn(4)


def test_one_graph_is_kept_for_all_products_and_freed_at_the_end():
    """Each may fill the memory."""
    x = torch.randn(1, 4)
    with input_hessian_operator(mlp(inputs=4), x, 0) as hessian:
        graphs = []
        for of in (hessian, hessian[0, 0], hessian.gauss_newton, hessian.gauss_newton[0, 0], hessian):
            of @ torch.randn(4)
            graphs.append(weakref.ref(of._blocks._operator))
            gc.collect()
            assert {id(graph()) for graph in graphs if graph() is not None} == {id(of._blocks._operator)}
    gc.collect()
    assert all(graph() is None for graph in graphs)


wrong_second_derivative = custom_function(lambda x: x**3, lambda x: 3 * x.detach() ** 2)


def test_the_first_product_is_compared_with_values():
    x = torch.randn(2, 4, dtype=F64) + 3
    with input_hessian_operator(lambda x: wrong_second_derivative(x).sum(1), x, 0) as hessian:
        with pytest.warns(UserWarning, match="The HVP of 2 of 2 samples cannot be trusted"):
            hessian[0, 0]
        assert not hessian.valid.any()
        hessian @ torch.ones(4)  # once
    with input_hessian_operator(lambda x: wrong_second_derivative(x).sum(1), x, 0, check=False) as hessian:
        hessian @ torch.ones(4)
        assert hessian.valid.all()


def test_warnings_name_the_line_of_the_user():
    with (
        input_hessian_operator(lambda x: wrong_second_derivative(x).sum(1), torch.full((2, 4), 3.0), 0) as hessian,
        pytest.warns(UserWarning, match="cannot be trusted") as caught,
    ):
        hessian @ torch.ones(4)
    assert caught[0].filename == __file__


def refused(model, x, classes, error, match, use=lambda hessian: None):
    with pytest.raises(error, match=match), input_hessian_operator(model, x, classes) as hessian:
        use(hessian)


def test_arguments_are_checked(q):
    model, x = quadratic(q), torch.randn(1, 7, dtype=F64)
    refused(model, x, 2, ConfigurationError, "out of range")
    refused(model, x, 0, ConfigurationError, "num_vectors", lambda hessian: hessian.trace(1))
    refused(model, x * torch.nan, 0, MeasurementError, "no Hessian to measure", lambda hessian: hessian @ x[0])
    refused(model, x, [1, 1], ConfigurationError, "lists 1 more than once")


def test_a_class_may_meet_itself_in_a_tensor(q):
    """Columns of a tensor may mean the label and the prediction, which agree for some samples."""
    with input_hessian_operator(quadratic(q), torch.randn(2, 7, dtype=F64), torch.tensor([[0, 1], [1, 1]])) as hessian:
        products = hessian @ torch.ones(7, dtype=F64)
    assert torch.equal(products[1, 0], products[1, 1])


def test_integers_of_numpy_and_tensors_are_whole_numbers(q):
    x = torch.randn(1, 7, dtype=F64)
    with input_hessian_operator(quadratic(q), x, np.int64(0), seed=np.int64(1), max_memory=np.int64(10**9)) as hessian:
        assert hessian.spectrum(num_eigenvalues=torch.tensor(3)).eigenvectors.shape[2] == 3
        assert torch.equal(hessian.trace(np.int64(2)).value, hessian.trace(2).value)


def test_no_graph_is_alive_beside_other_work():
    """What the first product built is freed before a spectrum, whose plan counts on the memory."""
    alive = Notes()
    network, x = mlp(inputs=4), torch.randn(2, 4)
    with input_hessian_operator(network, x, 0) as hessian:
        for use in (hessian.spectrum, hessian.to_dense, hessian.gradient, lambda: hessian.hvp(torch.randn(4))):
            hessian @ torch.randn(4)
            graph = weakref.ref(hessian._blocks._operator)
            handle = network.register_forward_hook(lambda *_, graph=graph: alive.append(graph() is not None))
            use()
            handle.remove()
        assert alive
        assert not any(alive)
        hessian @ torch.randn(4)


def test_threads_may_share_an_operator_and_a_model(q):
    """They take turns, so that all find the model as it was, and leave it so."""
    network = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Tanh(), nn.Linear(8, 2)).train()
    x, vectors = torch.randn(3, 4), torch.randn(12, 4)
    whole = input_hessian(network, x, [0, 1])
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as threads, input_hessian_operator(network, x, [0, 1]) as hessian:
            products = list(threads.map(lambda v: hessian @ v, vectors))
            matrices = list(threads.map(lambda _: input_hessian(network, x, [0, 1]), range(12)))
    finally:
        sys.setswitchinterval(before)
    for found, v in zip(products, vectors, strict=True):
        torch.testing.assert_close(found, whole @ v)
    assert all(torch.equal(found, whole) for found in matrices)
    assert network.training
    assert all(module.training and "_apply" not in vars(module) for module in network.modules())
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_buffers_are_copied_while_no_other_thread_measures():
    """Whose forward may have written to them."""
    owned = []

    class Network(nn.BatchNorm1d):
        def named_buffers(self, *arguments, **options):
            owned.append(ONE_AT_A_TIME._is_owned())
            return super().named_buffers(*arguments, **options)

    with input_hessian_operator(Network(4).eval(), torch.randn(3, 4), 0):
        assert owned[0]


def test_arguments_of_another_function_are_named():
    with pytest.raises(TypeError, match=r"no argument 'chunk_size' here; there are dtype, wrt"):
        input_gradient(mlp(inputs=4), torch.zeros(1, 4), 0, chunk_size=3)


def test_buffers_are_copied_only_where_they_may_change(monkeypatch):
    """By the operator at its opening; a function is over before its model can be trained."""
    network, x = nn.BatchNorm1d(4).eval(), torch.randn(3, 4)
    seen, take = [], ModelFunction.__post_init__

    def noted(function):
        seen.append(function.tensors)
        take(function)

    monkeypatch.setattr(ModelFunction, "__post_init__", noted)
    input_gradient(network, x, 0)
    assert not any(seen)
    with input_hessian_operator(network, x, 0):
        assert set(seen[-1]) == {"running_mean", "running_var", "num_batches_tracked"}
