import copy

import pytest
import torch

from mergeme_ext.moe import Experts, MoELayer, per_expert_state_dict

LAYOUTS = ["projections", "mixtral"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = {"projections": ("gate_proj", "up_proj", "down_proj"), "mixtral": ("w1", "w3", "w2")}


def changed(entries, **changes):
    """``entries`` with some replaced, by their name with "__" for "."; None removes."""
    entries = dict(entries)
    for name, value in changes.items():
        entries[name.replace("__", ".")] = value
    return {name: value for name, value in entries.items() if value is not None}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a
    )


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip_changes_no_bit(layout, dtype, assign):
    layer, other = MoELayer(6, 5, 3, dtype=dtype), MoELayer(6, 5, 3, dtype=dtype)
    entries = per_expert_state_dict(layer, layout)
    assert not same(layer, other)
    assert not other.load_state_dict(entries, assign=assign).missing_keys
    assert same(layer, other)
    again = per_expert_state_dict(other, layout)
    assert list(again) == list(entries)
    assert all(torch.equal(again[name], entries[name]) for name in entries)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_and_values_of_the_matrices(layout):
    layer = MoELayer(6, 5, 3)
    entries = per_expert_state_dict(layer, layout)
    gate, up, down = NAMES[layout]
    assert list(entries)[:4] == ["router.weight"] + [
        f"experts.0.{name}.weight" for name in (gate, up, down)
    ]
    assert len(entries) == 1 + 3 * 3
    for e in range(3):
        rows = layer.experts.gate_up_proj[e]
        assert torch.equal(entries[f"experts.{e}.{gate}.weight"], rows[:5])
        assert torch.equal(entries[f"experts.{e}.{up}.weight"], rows[5:])
        assert torch.equal(entries[f"experts.{e}.{down}.weight"], layer.experts.down_proj[e])


def test_a_bare_module_and_a_deep_one():
    experts = Experts(6, 5, 2)
    entries = per_expert_state_dict(experts)
    assert "0.gate_proj.weight" in entries and len(entries) == 6
    other = Experts(6, 5, 2)
    other.load_state_dict(entries)
    assert same(experts, other)
    deep = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ModuleList([MoELayer(6, 5, 2)]))
    entries = per_expert_state_dict(deep, "mixtral")
    assert "1.0.experts.1.w2.weight" in entries and "1.0.experts.down_proj" not in entries
    assert not any(deep.load_state_dict(entries))


def test_order_in_the_file_does_not_matter():
    experts, other = Experts(6, 5, 12), Experts(6, 5, 12)
    entries = per_expert_state_dict(experts)
    other.load_state_dict(dict(sorted(entries.items(), reverse=True)))
    assert same(experts, other)


def test_loads_into_the_dtype_of_the_parameters_or_takes_over_theirs():
    entries = per_expert_state_dict(Experts(6, 5, 2, dtype=torch.bfloat16))
    experts = Experts(6, 5, 2)
    experts.load_state_dict(entries)
    assert experts.down_proj.dtype == torch.float32
    assert torch.equal(experts.down_proj[1], entries["1.down_proj.weight"].float())
    experts = Experts(6, 5, 2, device="meta")
    experts.load_state_dict(entries, assign=True)
    assert experts.down_proj.dtype == torch.bfloat16 and experts.down_proj.device.type == "cpu"
    assert torch.equal(experts.gate_up_proj[1, 5:], entries["1.up_proj.weight"])


def test_leaves_the_given_state_dict_alone():
    entries = per_expert_state_dict(Experts(6, 5, 2))
    names = list(entries)
    Experts(6, 5, 2).load_state_dict(entries)
    assert list(entries) == names


def test_a_deep_copy_loads_into_itself():
    layer = MoELayer(6, 5, 2)
    entries = per_expert_state_dict(MoELayer(6, 5, 2))
    before = layer.experts.down_proj.clone()
    other = copy.deepcopy(layer)
    other.load_state_dict(entries)
    assert torch.equal(other.experts.down_proj[1], entries["experts.1.down_proj.weight"])
    assert torch.equal(layer.experts.down_proj, before)


def test_a_missing_matrix():
    layer = MoELayer(6, 5, 3)
    entries = changed(
        per_expert_state_dict(MoELayer(6, 5, 3), "mixtral"), experts__1__w3__weight=None
    )
    with pytest.raises(RuntimeError, match=r'Missing key.*: "experts.1.w3.weight"\. $'):
        layer.load_state_dict(entries)
    before = layer.experts.gate_up_proj.clone()
    result = layer.load_state_dict(entries, strict=False)
    assert result.missing_keys == ["experts.1.w3.weight"]
    assert torch.equal(layer.experts.gate_up_proj[1, 5:], before[1, 5:])
    assert torch.equal(layer.experts.gate_up_proj[1, :5], entries["experts.1.w1.weight"])


def test_an_expert_too_many():
    entries = per_expert_state_dict(MoELayer(6, 5, 4))
    layer = MoELayer(6, 5, 3)
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"experts.3.gate_proj.weight"'):
        layer.load_state_dict(changed(entries, router__weight=torch.zeros(3, 6)))


FUSED = "experts.gate_up_proj and experts.0.gate_proj.weight"
BAD = [
    ({"experts__1__up_proj__weight": torch.zeros(6, 5)}, r"experts.1.up_proj.weight of .*\[5, 6\]"),
    ({"experts__0__down_proj__weight": torch.zeros(5)}, r"shape \[6, 5\], got \[5\]"),
    ({"experts__0__down_proj__weight": torch.zeros(6, 5).half()}, "one dtype and device"),
    ({"experts__0__w2__weight": torch.zeros(6, 5)}, "one layout, got both"),
    ({"experts__gate_up_proj": torch.zeros(3, 10, 6)}, f"one layout, got both {FUSED}"),
    ({"experts__0__bias": torch.zeros(3)}, 'Unexpected key.*"experts.0.bias"'),
]


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("changes, message", BAD)
def test_rejects_what_does_not_fit(changes, message, strict):
    entries = changed(per_expert_state_dict(MoELayer(6, 5, 3)), **changes)
    layer = MoELayer(6, 5, 3)
    if "Unexpected" in message and not strict:
        assert layer.load_state_dict(entries, strict=False).unexpected_keys == ["experts.0.bias"]
        return
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(entries, strict=strict)


def test_rejects_an_unknown_layout():
    with pytest.raises(ValueError, match=r"layout to be one of .* got 'fused'"):
        per_expert_state_dict(MoELayer(6, 5, 3), "fused")
