"""Packed weights under transformers' experts: the cache, and packing in the parameters' place."""

import copy
import gc
import io
import pickle
import threading
import time

import pytest
import torch
from torch import nn

from mergeme_ext.integrations.transformers import pack_for_inference, register, unpack
from mergeme_ext.moe import packed
from mergeme_ext.moe.packed import packed_copies
from mergeme_ext.ops import pack_experts
from python_tests.support.experts_classes import build, inputs
from python_tests.support.experts_runs import assert_as_good, exact, run

register()

MIXTRAL = ("mixtral.modeling_mixtral", "MixtralExperts")
GPT_OSS = ("gpt_oss.modeling_gpt_oss", "GptOssExperts")  # two matmuls, transposed weights
ARIA = ("aria.modeling_aria", "AriaExperts")  # fused, transposed weights
NEMOTRON = ("nemotron_h.modeling_nemotron_h", "NemotronHExperts")  # no gate
KINDS = pytest.mark.parametrize("kind", [MIXTRAL, GPT_OSS, ARIA, NEMOTRON], ids=lambda k: k[1])
PACKED_TYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(kind, dtype=torch.float32):
    experts = build(*kind, dtype)
    experts.config._experts_implementation = "mergeme"
    return experts, inputs(experts, dtype=dtype)


@torch.no_grad()
def unpacked(experts, x, ids, weights):
    """The same forward without packing: training mode uses none."""
    was = experts.training
    try:
        return experts.train()(x, ids, weights)
    finally:
        experts.train(was)


@torch.no_grad()
def assert_right(experts, routed):
    """Against the same module's copy, which knows nothing of the cache."""
    out, other = experts(*routed), copy.deepcopy(experts)
    with torch.enable_grad():
        expected = exact(other, *routed, torch.ones_like(routed[0]))[:1]
    assert_as_good([out], expected, [run(other, kind, *routed) for kind in ("eager", "batched_mm")])
    return out


@KINDS
@pytest.mark.parametrize("dtype", PACKED_TYPES, ids=str)
def test_packs_once(kind, dtype):
    experts, routed = make(kind, dtype)
    made = packed_copies.made
    first = assert_right(experts, routed)
    for _ in range(3):
        assert torch.equal(assert_right(experts, routed), first)
    assert packed_copies.made == made + 2


def in_place(experts):
    with torch.no_grad():
        experts.down_proj.mul_(-1)


def through_data(experts):
    experts.down_proj.data.mul_(-1)


def one_expert_through_data(experts):
    experts.gate_up_proj.data[2] *= -1


def through_numpy(experts):
    experts.down_proj.detach().numpy()[...] *= -1


def new_data(experts):
    experts.down_proj.data = -experts.down_proj.data


def new_parameter(experts):
    experts.down_proj = nn.Parameter(-experts.down_proj.detach())


def loaded(experts):
    experts.load_state_dict({name: -value for name, value in experts.state_dict().items()})


def assigned(experts):
    state = {name: -value for name, value in experts.state_dict().items()}
    experts.load_state_dict(state, assign=True)


def optimiser(experts):
    for fused in (False, True):
        step = torch.optim.SGD(experts.parameters(), lr=0.1, fused=fused)
        for parameter in experts.parameters():
            parameter.grad = torch.ones_like(parameter)
        step.step()


def swapped_and_freed(experts):
    # New weights at the old address, if the allocator gives it out again.
    shape = experts.down_proj.shape
    experts.down_proj.data = torch.empty(0)
    experts.down_proj.data = torch.full(shape, 0.3)


def inference_mode(experts):
    with torch.inference_mode():
        experts.down_proj.mul_(-1)


CHANGES = [
    in_place,
    through_data,
    one_expert_through_data,
    through_numpy,
    new_data,
    new_parameter,
    loaded,
    assigned,
    optimiser,
    swapped_and_freed,
    inference_mode,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_notices_changed_weights(change):
    experts, routed = make(MIXTRAL)
    before = assert_right(experts, routed)
    change(experts)
    assert not torch.allclose(assert_right(experts, routed), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_notices_another_dtype(dtype):
    experts, (x, ids, weights) = make(MIXTRAL)
    assert_right(experts, (x, ids, weights))
    experts.to(dtype)
    out = assert_right(experts, (x.to(dtype), ids, weights))
    assert out.dtype == dtype
    experts.to(torch.float32)
    assert_right(experts, (x, ids, weights))


def test_autocast_has_a_copy_of_its_own():
    experts, routed = make(MIXTRAL)
    full = assert_right(experts, routed)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = experts(*routed)
        assert torch.equal(experts(*routed), low)
        torch.testing.assert_close(low, unpacked(experts, *routed))
    assert not torch.equal(full, low)
    assert torch.equal(assert_right(experts, routed), full)


def test_nan_weights_are_no_change():
    experts, routed = make(MIXTRAL)
    experts.gate_up_proj.data.fill_(float("nan"))
    made = packed_copies.made
    for _ in range(2):
        with torch.no_grad():
            assert experts(*routed).isnan().all()
    assert packed_copies.made == made + 2


def test_inference_tensors():
    with torch.inference_mode():
        experts, routed = make(MIXTRAL)
        assert experts.down_proj.is_inference()
        made = packed_copies.made
        before = experts(*routed)
        assert torch.equal(experts(*routed), before) and packed_copies.made == made + 2
        experts.down_proj.mul_(-1)
        assert torch.equal(experts(*routed), -before)
    with torch.no_grad():
        assert torch.equal(experts(*routed), -before)


def test_copies_die_with_their_weights():
    gc.collect()
    count = len(packed_copies)
    experts, routed = make(MIXTRAL)
    assert_right(experts, routed)
    assert len(packed_copies) == count + 2
    del experts
    gc.collect()
    assert len(packed_copies) == count


def test_training_drops_the_copies():
    experts, routed = make(MIXTRAL)
    assert_right(experts, routed)
    count = len(packed_copies)
    experts(*routed).sum().backward()
    assert len(packed_copies) == count - 2
    made = packed_copies.made
    with torch.no_grad():
        experts.train()(*routed)  # as checkpointing does in a training step
    assert packed_copies.made == made


def test_state_dict_deep_copy_and_pickle_know_nothing():
    experts, routed = make(MIXTRAL)
    names, size = list(experts.state_dict()), len(pickle.dumps(experts))
    expected = assert_right(experts, routed)
    assert list(experts.state_dict()) == names and len(pickle.dumps(experts)) == size
    other = copy.deepcopy(experts)
    with torch.no_grad():
        experts.down_proj.mul_(2)
    assert torch.equal(assert_right(other, routed), expected)
    assert not torch.equal(assert_right(experts, routed), expected)


def test_computed_weights_are_not_cached():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    experts, routed = make(MIXTRAL)
    before, made = assert_right(experts, routed), packed_copies.made
    nn.utils.parametrize.register_parametrization(experts, "down_proj", Doubled())
    torch.testing.assert_close(assert_right(experts, routed), 2 * before)
    assert packed_copies.made == made
    nn.utils.parametrize.remove_parametrizations(experts, "down_proj", leave_parametrized=False)
    assert torch.equal(assert_right(experts, routed), before)


def test_weights_with_other_strides_are_not_cached():
    experts, routed = make(MIXTRAL)
    before = assert_right(experts, routed)
    down = experts.down_proj.detach()
    experts.down_proj = nn.Parameter(down.transpose(1, 2).contiguous().transpose(1, 2))
    made = packed_copies.made
    torch.testing.assert_close(assert_right(experts, routed), before)
    assert packed_copies.made == made


def test_threads_make_one_copy(monkeypatch):
    def slow(*args, **options):
        time.sleep(0.05)  # so that the others come while the first packs
        return pack_experts(*args, **options)

    monkeypatch.setattr(packed, "pack_experts", slow)
    experts, routed = make(MIXTRAL)
    expected = unpacked(experts, *routed)
    made, outs = packed_copies.made, []
    start = threading.Barrier(8)

    def call():
        start.wait()
        with torch.no_grad():
            outs.extend(experts(*routed) for _ in range(5))

    threads = [threading.Thread(target=call) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert packed_copies.made == made + 2 and len(outs) == 40
    for out in outs:
        torch.testing.assert_close(out, expected)


def test_the_cache_can_be_left_out():
    experts, routed = make(MIXTRAL)
    made = packed_copies.made
    register(cache=False)
    try:
        assert_right(experts, routed)
        assert packed_copies.made == made
        pack_for_inference(experts)
        with torch.no_grad():
            experts(*routed)
    finally:
        register()


@pytest.mark.slow
@KINDS
@torch.no_grad()
def test_compiled_graphs_look_the_copy_up(kind):
    experts, routed = make(kind)
    torch.compiler.reset()  # all classes share the code object of one forward
    compiled = torch.compile(experts, fullgraph=True)
    made = packed_copies.made
    before = compiled(*routed)
    for _ in range(3):
        assert torch.equal(compiled(*routed), before)
    assert packed_copies.made == made + 2
    torch.testing.assert_close(before, unpacked(copy.deepcopy(experts), *routed))
    experts.down_proj.data.mul_(2)
    after = compiled(*routed)
    torch.testing.assert_close(after, unpacked(copy.deepcopy(experts), *routed))
    assert not torch.allclose(after, before)


# In the parameters' place.


@KINDS
@pytest.mark.parametrize("dtype", PACKED_TYPES, ids=str)
def test_packing_in_place_and_back(kind, dtype):
    experts, routed = make(kind, dtype)
    experts.down_proj.requires_grad_(False)
    state = copy.deepcopy(experts.state_dict())
    expected, made = assert_right(experts, routed), packed_copies.made
    pack_for_inference(experts)
    assert not any(name.endswith("_proj") for name, _ in experts.named_parameters())
    with torch.no_grad():
        assert torch.equal(experts(*routed), expected)
    assert packed_copies.made == made
    assert_same(experts.state_dict(), state)
    pack_for_inference(experts)  # again: nothing to do
    unpack(experts)
    assert_same(experts.state_dict(), state)
    assert experts.down_proj.requires_grad is False
    assert all(p.requires_grad for n, p in experts.named_parameters() if n != "down_proj")
    assert not experts._state_dict_hooks and not experts._load_state_dict_pre_hooks
    assert not experts._forward_pre_hooks
    assert torch.equal(assert_right(experts, routed), expected)
    unpack(experts)


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        bits = torch.int32 if value.dtype == torch.float32 else torch.int16
        assert state[name].dtype == value.dtype and state[name].shape == value.shape
        assert torch.equal(state[name].view(bits), value.view(bits))


def test_packed_modules_refuse_what_they_cannot_do():
    experts, (x, ids, weights) = make(MIXTRAL)
    state = copy.deepcopy(experts.state_dict())
    pack_for_inference(experts)
    with pytest.raises(RuntimeError, match="down_proj is packed for inference; unpack"):
        experts.load_state_dict(state)
    with pytest.raises(RuntimeError, match="packed for inference have no gradient"):
        experts(x.clone().requires_grad_(), ids, weights)
    with torch.no_grad():
        for other in ("eager", "batched_mm", "grouped_mm"):
            experts.config._experts_implementation = other
            with pytest.raises(RuntimeError, match=f'"mergeme" only, got {other!r}'):
                experts(x, ids, weights)
            with pytest.raises((TypeError, AttributeError), match="None"):  # past the hook
                experts.forward(x, ids, weights)
        experts.config._experts_implementation = "mergeme"
        expected = experts(x, ids, weights)
        experts.to("cpu").half()  # what is packed keeps its dtype
        assert torch.equal(experts(x, ids, weights), expected)
        assert torch.equal(experts(x.double(), ids, weights).float(), expected)
        with pytest.raises(RuntimeError, match="stay on the CPU, but the tokens are on meta"):
            experts(x.to("meta"), ids, weights)
        was, experts.act_fn = experts.act_fn, nn.ReLU()
        with pytest.raises(RuntimeError, match="for another gate or activation"):
            experts(x, ids, weights)
        experts.act_fn = was
    unpack(experts)
    assert_same(experts.state_dict(), state)


def test_packed_modules_copy_and_pickle():
    experts, routed = make(MIXTRAL)
    pack_for_inference(experts)
    with torch.no_grad():
        expected = experts(*routed)
        file = io.BytesIO()
        torch.save(experts, file)
        file.seek(0)
        for other in (copy.deepcopy(experts), torch.load(file, weights_only=False)):
            assert torch.equal(other(*routed), expected)
            unpack(other)
            assert_same(other.state_dict(), experts.state_dict())


def test_refuses_to_pack():
    experts, _ = make(MIXTRAL)
    experts.config._experts_implementation = "eager"
    with pytest.raises(ValueError, match='experts_implementation="mergeme", got MixtralExperts'):
        pack_for_inference(experts)
    for dtype, device in ((torch.float64, "cpu"), (torch.float32, "meta")):
        experts, _ = make(MIXTRAL)
        experts.to(device, dtype)
        with pytest.raises(ValueError, match="gate_up_proj, down_proj to be parameters on the CPU"):
            pack_for_inference(experts)
    model = nn.ModuleList([make(MIXTRAL)[0], make(MIXTRAL, torch.float64)[0]])
    with pytest.raises(ValueError, match="one dtype"):
        pack_for_inference(model)
    assert not any(p.is_meta for p in model.parameters())
