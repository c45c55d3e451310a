"""Runs experts classes of transformers, and judges the results."""

import copy

import torch

from python_tests.references.experts_interface import experts_interface as reference


def run(experts, implementation, x, ids, weights, grad=None):
    """The output, then the gradients of x, weights and every parameter."""
    experts.config._experts_implementation = implementation
    x, weights = x.detach().requires_grad_(), weights.detach().requires_grad_()
    for parameter in experts.parameters():
        parameter.grad = None
    out = experts(x, ids, weights)
    if grad is None:
        return [out.detach()]
    out.backward(grad.to(out.dtype))
    return [out.detach(), x.grad, weights.grad, *(p.grad for p in experts.parameters())]


def exact(experts, x, ids, weights, grad):
    double = copy.deepcopy(experts).double()
    x, weights = x.double().requires_grad_(), weights.double().requires_grad_()
    out = reference(double, x, ids, weights)
    out.backward(grad.double())
    return [out.detach(), x.grad, weights.grad, *(p.grad for p in double.parameters())]


def assert_as_good(ours, expected, peers):
    """At most twice the larger error of transformers' own implementations, plus one unit in the
    last place of the largest value."""
    for i, (a, e) in enumerate(zip(ours, expected, strict=True)):
        if e is None:
            assert a is None
            continue
        if e.numel() == 0:
            assert a.shape == e.shape
            continue
        allowed = max((p[i].double() - e).abs().max().item() for p in peers)
        bound = 2 * allowed + torch.finfo(a.dtype).eps * e.abs().max().item()
        error = (a.double() - e).abs().max().item()
        assert error <= bound, f"tensor {i}: error {error:.3g} above {bound:.3g}"
