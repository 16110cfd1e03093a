"""Density functions: values, axes, gradients, bad arguments; and that pydenoise's functions win over its submodules."""

import importlib
import sys
import types

import pytest
import torch

import pydenoise as pdn


def test_published_example():
    alpha = torch.tensor([0.25, 0.15, 0.55, 1.0, 0.55, 0.15, 0.25])
    torch.testing.assert_close(pdn.density((0.25, 0.15, 0.55), 7), torch.outer(alpha, alpha))
    torch.testing.assert_close(pdn.density((0.25, 0.15, 0.55), 7, dims=1), alpha)
    cube = torch.einsum("i,j,k->ijk", alpha, alpha, alpha)
    torch.testing.assert_close(pdn.density((0.25, 0.15, 0.55), (7, 7, 7)), cube)
    assert torch.equal(pdn.density([0.25, 0.15, 0.55], 7, dims=3), pdn.density((0.25, 0.15, 0.55), (7, 7, 7)))


def test_one_list_per_axis():
    expected = torch.outer(torch.tensor([0.7, 1, 0.7]), torch.tensor([0.2, 0.8, 1, 0.8, 0.2]))
    torch.testing.assert_close(pdn.density(((0.7,), (0.2, 0.8)), (3, 5)), expected)
    torch.testing.assert_close(pdn.density((torch.tensor([0.7]), torch.tensor([0.2, 0.8])), (3, 5)), expected)
    torch.testing.assert_close(pdn.density(((), (0.2, 0.8)), (1, 5)), torch.tensor([[0.2, 0.8, 1, 0.8, 0.2]]))
    assert torch.equal(pdn.density(torch.tensor([[0.5], [0.25]]), 3), pdn.density(((0.5,), (0.25,)), 3))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_extent_one_takes_no_coefficients(dims):
    assert torch.equal(pdn.density((), 1, dims=dims), torch.ones((1,) * dims))
    assert torch.equal(pdn.density(((),) * dims, (1,) * dims), torch.ones((1,) * dims))


def test_dtype_and_rounding():
    assert pdn.density((0.3,), 3).dtype == torch.float32
    exact = pdn.density((0.3, 0.7), 5, dtype=torch.float64)
    assert torch.equal(pdn.density((0.3, 0.7), 5, dtype=torch.bfloat16), exact.bfloat16()), "rounded once"
    assert pdn.density(torch.tensor([0.3], dtype=torch.float64), 3).dtype == torch.float64
    assert pdn.density((0.3,), 3, device="meta").is_meta


@pytest.mark.parametrize("kernel", [(5,), (5, 5), (3, 5), (3, 1, 5)])
def test_gradient(kernel):
    lists = [torch.rand(k // 2, dtype=torch.float64, requires_grad=True) for k in kernel]
    assert torch.autograd.gradcheck(lambda *halves: pdn.density(halves, kernel), lists)


def test_gradient_of_shared_coefficients():
    shared = torch.rand(2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda half: pdn.density(half, 5, dims=3), shared)


@pytest.mark.parametrize(
    ("coefficients", "kernel", "error", "message"),
    [
        ((0.5,), 4, ValueError, "odd"),
        (((0.5,), (0.5,)), (3, 2), ValueError, "odd"),
        ((0.5,), 5, ValueError, "takes 2 coefficients"),
        ((0.5,), 1, ValueError, "takes 0 coefficients"),
        ((), 3, ValueError, "takes 1 coefficients"),
        ((0.5,), (3, 5), ValueError, "one list per axis"),
        (((0.5,),), 3, ValueError, "one list of coefficients per axis, 2"),
        (((0.5,), (0.5,), (0.5,)), 3, ValueError, "got 3"),
        (((0.5,), 0.5), 3, TypeError, "mixture"),
        ((float("nan"),), 3, ValueError, "finite"),
        (torch.tensor([float("inf")]), 3, ValueError, "finite"),
        (torch.tensor([1]), 3, TypeError, "floating"),
        (torch.ones(1, 1, 1), 3, ValueError, "one dimension"),
        (("a",), 3, (TypeError, ValueError), "density"),
        ("a", 3, TypeError, "got str"),
        (0.5, 3, TypeError, "got float"),
        ((1j,), 3, TypeError, "real numbers"),
        ((0.5,), 0, ValueError, ">= 1"),
        ((0.5,), 3.0, TypeError, "kernel_size"),
        ((0.5,), (3,) * 4, ValueError, "kernel_size"),
    ],
)
def test_bad_arguments(coefficients, kernel, error, message):
    with pytest.raises(error, match=message):
        pdn.density(coefficients, kernel)


def test_bad_dims():
    with pytest.raises(ValueError, match="dims"):
        pdn.density((0.5,), 3, dims=4)
    with pytest.raises(ValueError, match="dims=3"):
        pdn.density((0.5,), (3, 3), dims=3)


@pytest.mark.parametrize("name", ["density", "explain", "accelerate"])
@pytest.mark.parametrize(
    "imports",
    [
        "import {origin}, pydenoise as pdn",
        "import pydenoise as pdn; pdn.{name}; import {origin}",
        "import pydenoise as pdn; from {origin} import {name}",
        "from pydenoise import {name} as f; import {origin}, pydenoise as pdn; assert pdn.{name} is f",
    ],
)
def test_public_function_wins_over_the_submodule_of_its_name(name, imports, monkeypatch):
    """In any order of imports, ``pydenoise.<name>`` is the function."""
    origin = pdn._NAMES[name]
    # As in a fresh process: neither the package's attribute nor the submodule is there yet.
    pdn.__dict__.pop(name, None)
    monkeypatch.delitem(sys.modules, origin, raising=False)
    namespace = {}
    exec(imports.format(origin=origin, name=name), namespace)
    assert isinstance(getattr(namespace["pdn"], name), types.FunctionType)


def test_reload_keeps_the_functions():
    importlib.reload(importlib.import_module("pydenoise.explain"))
    assert callable(pdn.explain)
