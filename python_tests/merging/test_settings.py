import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergeme_ext.merging.settings import Condition, Setting, SettingError, first_value


def values(setting, layers):
    return [setting.at("n", i / (layers - 1)) for i in range(layers)]


def test_a_gradient_goes_straight_from_anchor_to_anchor():
    """The worked numbers: five anchors over seven layers; the head takes the first."""
    gradient = Setting.of([0, 0.5, 0.3, 0.7, 1])
    expected = [0, 0.333333, 0.433333, 0.3, 0.566667, 0.8, 1]
    assert values(gradient, 7) == pytest.approx(expected, abs=1e-6)
    assert gradient.at("lm_head.weight", 0.0) == 0


def test_other_lists_go_in_steps():
    steps = Setting.of([True, False, True])
    assert values(steps, 5) == [True, True, False, False, True]
    assert values(Setting.of(["l1", "none"]), 3) == ["l1", "l1", "none"]
    assert values(Setting.of([1, "1/n"]), 3) == [1, 1, "1/n"]  # not all are numbers


@pytest.mark.parametrize("layers", range(2, 130))
def test_a_value_for_each_layer_is_that_layers(layers):
    """Positions are quotients and may fall short of a step by a rounding."""
    words = [f"w{i}" for i in range(layers)]
    assert values(Setting.of(words), layers) == words
    assert values(Setting.of(list(range(layers))), layers) == pytest.approx(range(layers))


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=6), st.floats(0, 1))
def test_a_gradient_stays_between_its_neighbours(anchors, t):
    place = t * (len(anchors) - 1)
    left, right = anchors[math.floor(place)], anchors[math.ceil(place)]
    value = Setting.of(anchors).at("n", t)
    assert min(left, right) - 1e-9 <= value <= max(left, right) + 1e-9
    reference = left + (place - math.floor(place)) * (right - left)
    assert value == pytest.approx(reference, abs=1e-9)


def test_the_first_condition_that_matches_goes():
    setting = Setting.of(
        [
            {"filter": "mlp", "value": [0, 1]},
            {"filter": "mlp.up", "value": 7},
            {"filter": "attn", "value": "1e-1"},
        ]
    )
    assert setting.at("layers.0.mlp.up_proj", 0.5) == 0.5
    assert setting.at("layers.0.self_attn.q_proj", 0.5) == 0.1
    assert setting.at("norm", 0.5) is None


@pytest.mark.parametrize("everything", [{"value": 3}, {"filter": None, "value": 3}])
def test_what_matches_everything(everything):
    assert Setting.of([{"filter": "x", "value": 1}, everything]).at("norm", 0) == 3
    assert Setting.of({"filter": "*", "value": 3}).at("norm", 0) == 3
    assert Setting.of(everything).at("norm", 0) == 3


def test_filters_are_plain_text():
    setting = Setting.of({"filter": "layers.1.", "value": 1})
    assert setting.at("model.layers.1.mlp", 0) == 1
    assert setting.at("model.layers.11.mlp", 0) is None
    assert Setting.of({"filter": ".*", "value": 1}).at("model.layers.1.mlp", 0) is None


def test_levels():
    source = {"w": Setting.of({"filter": "mlp", "value": 1})}
    piece = {"w": Setting.of([{"filter": "attn", "value": 2}]), "other": Setting.of(9)}
    shared = {"w": Setting.of(3)}
    levels = (source, piece, {}, shared)
    assert first_value(levels, "w", "mlp.up", 0) == 1
    assert first_value(levels, "w", "attn.q", 0) == 2  # the first level falls through
    assert first_value(levels, "w", "norm", 0) == 3
    assert first_value(levels, "none", "norm", 0) is None


@pytest.mark.parametrize(
    "value",
    [
        0.5,
        True,
        "1/n",
        [0, 0.5, 1],
        [True, False],
        [{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}],
    ],
    ids=str,
)
def test_documents_come_back(value):
    assert Setting.of(value).document() == value
    assert Setting.of(Setting.of(value).document()) == Setting.of(value)


def test_numbers_may_be_texts():
    assert Setting.of("1e-3").anchors == (0.001,)
    assert Setting.of(["1e-3", 1]).at("n", 0.5) == pytest.approx(0.5005)
    one = Setting.of({"filter": "x", "value": 1})
    assert one.conditions == (Condition("x", Setting((1,))),)


def small(value):
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("small")


def whole(value):
    if not isinstance(value, int):
        raise ValueError("a whole number")


BAD = [
    (2, small, (), " to be small, got 2"),
    ([0, 2], small, (1,), " to be small, got 2"),
    ([{"value": 1}, {"value": [1, "x"]}], small, (1, "value", 1), " to be small, got 'x'"),
    ([1, 2, 4], whole, (0,), " to be a whole number, got 1.5, which lies between"),
    ([], small, (), r" to be a value or a list of values, got []"),
    (None, small, (), " to be a number, a text, or true or false, got None"),
    ([[1]], small, (0,), " to be a number, a text, or true or false, got [1]"),
    ([{"value": 1}, 1], small, (1,), " to be a mapping with filter and value, as its"),
    ([1, {"value": 1}], small, (0,), " to be a mapping with filter and value, as its"),
    ({"fliter": "x", "value": 1}, small, (), "; did you mean 'filter'?"),
    ([{"filter": "x"}], small, (0,), ""),
    ({"filter": 3, "value": 1}, small, ("filter",), " to be a part of tensors' names, got 3"),
    ({"filter": "", "value": 1}, small, ("filter",), " to be a part of tensors' names, got ''"),
    ({"value": {"value": 1}}, small, ("value",), " to be a number, a text, or true or false"),
]


@pytest.mark.parametrize("value, check, place, after", BAD)
def test_bad_values(value, check, place, after):
    with pytest.raises(SettingError) as caught:
        Setting.of(value, check)
    assert caught.value.place == place and caught.value.after.startswith(after)
