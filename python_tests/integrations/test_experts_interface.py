import copy

import pytest
import torch
from torch import nn
from transformers import activations

from mergeme_ext.integrations.experts_interface import fused_activation
from mergeme_ext.integrations.transformers import register
from python_tests.references.experts_interface import experts_interface as reference
from python_tests.support import experts_classes
from python_tests.support.experts_classes import build, inputs

register()

CLASSES = experts_classes.decorated()
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EVERY_CLASS = pytest.mark.parametrize("module, name", CLASSES, ids=[name for _, name in CLASSES])


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


def test_every_wrapped_class_is_found():
    found = {(module, name) for module in dict(CLASSES) for name in experts_classes.wrapped(module)}
    assert found == set(CLASSES) and len(found) > 60


@EVERY_CLASS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_class_computes_and_trains_as_eager_does(module, name, dtype):
    experts = build(module, name, dtype)
    x, ids, weights = inputs(experts, dtype=dtype)
    grad = torch.randn_like(x)
    expected = exact(experts, x, ids, weights, grad)
    # Some classes' eager code computes in a wider type than the interface's other implementations.
    peers = [run(experts, kind, x, ids, weights, grad) for kind in ("eager", "batched_mm")]
    assert_as_good(run(experts, "mergeme", x, ids, weights, grad), expected, peers)


@EVERY_CLASS
def test_every_class_leaves_out_other_processes_experts(module, name):
    experts = build(module, name)
    experts._is_expert_parallel = True
    x, ids, weights = inputs(experts, num_tokens=12)
    ids[::2, 1] = ids[3] = experts.num_experts
    weights = weights.masked_fill(ids == experts.num_experts, 0.0)
    grad = torch.randn_like(x)
    expected = exact(experts, x, ids, weights, grad)
    # The eager code of three classes knows no such ids; batched_mm does in all.
    peers = [run(experts, "batched_mm", x, ids, weights, grad)]
    ours = run(experts, "mergeme", x, ids, weights, grad)
    assert_as_good(ours, expected, peers)
    assert not ours[0][3].any() and not ours[1][3].any() and not ours[2][ids == 5].any()
