"""What the comparison with mergekit counts. Mergekit itself is not needed here."""

import json

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import compare_mergekit as cm
from mergeme_ext.merging import registry


def weights(folder, **tensors):
    folder.mkdir()
    tensors = {name: t.clone() for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    return cm.Weights(folder)


def test_figures_count_steps_and_changes(tmp_path):
    base = torch.zeros(6)
    # bfloat16 has 8 bits: 1, 1 + 2^-7, 1 + 2^-6 are neighbours; 3e-8 is noise beside 1.
    theirs = torch.tensor([1.0, 1.0, 1.0, -1.0, 0.0, 0.0])
    ours = torch.tensor([1.0, 1 + 2**-7, 1 + 2**-6, 1.0, 3e-8, 3e-4])
    x = weights(tmp_path / "x", a=ours, b=ours, c=ours)
    y = weights(tmp_path / "y", a=theirs, b=theirs[:5].clone(), d=theirs)
    f = cm.figures(x, y, weights(tmp_path / "base", a=base))
    assert f["equal"] == pytest.approx(1 / 6)
    assert f["one_step"] == pytest.approx(3 / 6)
    assert (f["max_difference"], f["where"]) == (2, "a")
    assert f["change"] == pytest.approx((ours - theirs).norm().item() / 2)
    assert (f["only_ours"], f["only_theirs"]) == (["c"], ["d"])
    assert f["shapes"] == ["b: [6] and [5]"]


def test_statistics_tell_a_wrong_density(tmp_path):
    generator = torch.Generator().manual_seed(0)
    base, delta = torch.zeros(400, 300), torch.randn(400, 300, generator=generator)
    sides = {
        name: weights(
            tmp_path / name, a=delta * (torch.rand(400, 300, generator=generator) < density)
        )
        for name, density in (("x", 0.5), ("y", 0.5), ("z", 0.52))
    }
    start = weights(tmp_path / "base", a=base)
    same = cm.statistics(sides["x"], sides["y"], start)
    other = cm.statistics(sides["x"], sides["z"], start)
    assert same["largest_share_difference_in_deviations"] < 4
    assert other["largest_share_difference_in_deviations"] > 6
    assert same["changed"] == pytest.approx([0.5, 0.5], abs=0.01)
    assert same["norm"][0] == pytest.approx(same["norm"][1], rel=0.02)


@pytest.mark.parametrize(
    "share, text", [(1.0, "100 %"), (1 - 1e-9, "99.9999 %"), (0.5, "50.0000 %")]
)
def test_only_all_is_called_all(share, text):
    assert cm._percent(share) == text


def test_every_method_that_recipes_name_is_compared_and_explained_only_once():
    methods = {name.split()[0] for name in cm.RECIPES}
    assert methods <= set(registry.names())
    assert set(cm.RANDOM) <= methods
    assert set(cm.WHY) <= {*cm.RECIPES, *cm.EXAMPLES}


def test_a_failed_merge_is_a_row_of_the_table():
    lines = [
        {"recipe": "karcher", "errors": {"mergekit bfloat16": "ValueError: no"}},
        {"recipe": "ram", "errors": {}, "float32": {"equal": 1.0, "one_step": 1.0}},
    ]
    lines[1]["float32"] |= {"max_difference": 0.0, "change": 0.0}
    first, second = cm.table(json.loads(json.dumps(lines))).splitlines()[-2:]
    assert "mergekit bfloat16: ValueError: no" in first
    assert second.startswith("| ram | - | - | - | - | 100 % | 100 % | 0 |")
