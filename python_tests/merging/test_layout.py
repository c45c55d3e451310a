import json

import pytest
import torch

from mergeme_ext.io import CheckpointError, CheckpointSource
from mergeme_ext.merging import MergeSpec, lay_out, load_merge_spec
from python_tests.merging import recipe_methods
from python_tests.support.checkpoints import save

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
Q, UP = ".self_attn.q_proj.weight", ".mlp.up_proj.weight"


def decoder(layers, rests=(Q, UP), prefix="model.layers.", head=True):
    """Names of a decoder; ``rests`` are each layer's, or a function of the layer."""
    names = [EMBEDDING]
    for i in range(layers):
        names += [f"{prefix}{i}{rest}" for rest in (rests(i) if callable(rests) else rests)]
    return [*names, NORM] + [HEAD] * head


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Write models by their tensors' names, and lay recipes out."""
    recipe_methods.install(monkeypatch)
    monkeypatch.chdir(tmp_path)

    class World:
        def model(self, name, names, **config):
            counts = [n.split(".")[2] for n in names if n.startswith("model.layers.")]
            count = {"num_hidden_layers": max(map(int, counts)) + 1} if counts else {}
            tensors = {n: torch.full((2,), float(i)) for i, n in enumerate(names)}
            save(tmp_path / name, tensors, count | config)

        def lay_out(self, text, **options):
            (tmp_path / "r.yaml").write_text(text)
            spec = load_merge_spec("r.yaml")
            return self.of_spec(spec, **options)

        def of_spec(self, spec, **options):
            sources = {model: CheckpointSource(model.path) for model in spec.references}
            return lay_out(spec, sources, **options)

    return World()


def by_name(layout):
    return {a.name: a for a in layout.assignments}


def origins(layout):
    """From each tensor of the result to what it is made of, as MODEL:NAME."""
    return {
        a.name: [f"{m.name}:{n}" for m, n in zip(a.models, a.names, strict=True)]
        for a in layout.assignments
    }


def weights(layout, rest=UP, index=0, key="weights"):
    """One model's weights over the layers."""
    named = by_name(layout)
    found = (named.get(f"model.layers.{i}{rest}") for i in range(200))
    return [a.parameters[key][index] for a in found if a is not None]


# Parameters


def test_a_gradient_runs_over_the_layers_and_the_rest_takes_its_first_anchor(world):
    """The worked numbers."""
    for name in "ab":
        world.model(name, decoder(7))
    layout = world.lay_out(
        "merge_method: linear\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {weight: [0, 0.5, 0.3, 0.7, 1]}\n"
    )
    expected = [0, 0.333333, 0.433333, 0.3, 0.566667, 0.8, 1]
    assert weights(layout) == pytest.approx(expected, abs=1e-6)
    for name in (EMBEDDING, NORM, HEAD):
        assert by_name(layout)[name].parameters["weights"] == [0, 0]


def test_a_gradient_starts_anew_in_each_slice_and_one_layer_takes_the_last_anchor(world):
    for name in "ab":
        world.model(name, decoder(8))
    layout = world.lay_out("""
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [1, 4]}]
  - sources: [{model: a, layer_range: [3, 4]}, {model: b, layer_range: [6, 7]}]
  - sources: [{model: a, layer_range: [4, 6]}, {model: b, layer_range: [6, 8]}]
    parameters: {weight: [5, 7]}
parameters: {weight: [0, 1]}
""")
    assert weights(layout) == [0, 0.5, 1, 1, 5, 7]
    assert by_name(layout)[EMBEDDING].parameters["weights"] == [0, 0]
    assert by_name(layout)[HEAD].parameters["weights"] == [5, 5]  # as the last slice has it


def test_levels_and_falling_through(world):
    for name in "ab":
        world.model(name, decoder(1))
    layout = world.lay_out("""
merge_method: linear
slices:
  - sources:
      - model: a
        layer_range: [0, 1]
        parameters: {weight: [{filter: q_proj, value: 2}]}
      - {model: b, layer_range: [0, 1]}
    parameters: {weight: [{filter: proj, value: 3}], normalize: false}
parameters: {weight: [{filter: lm_head, value: 5}, {value: 4}], normalize: true}
""")
    found = {name: a.parameters["weights"] for name, a in by_name(layout).items()}
    assert found == {
        EMBEDDING: [4, 4],
        f"model.layers.0{Q}": [2, 3],
        f"model.layers.0{UP}": [3, 3],
        NORM: [4, 4],
        HEAD: [5, 5],
    }
    assert not any(a.parameters["normalize"] for a in layout.assignments)


def test_a_modules_level_lies_between(world):
    for name in "ab":
        world.model(name, decoder(1))
    layout = world.lay_out("""
merge_method: linear
modules:
  text_decoder:
    slices: [{sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]}]
    parameters: {weight: [{filter: q_proj, value: 2}]}
parameters: {weight: [{filter: proj, value: 3}, {value: 4}]}
""")
    assert by_name(layout)[f"model.layers.0{Q}"].parameters["weights"] == [2, 2]
    assert by_name(layout)[f"model.layers.0{UP}"].parameters["weights"] == [3, 3]
    assert by_name(layout)[NORM].parameters["weights"] == [4, 4]


def test_filters_know_per_model_inputs_and_shared_outputs(world):
    """Layer 1 of b becomes layer 2: its own filters see 1, those for the whole merge see 2."""
    for name in "ab":
        world.model(name, decoder(3))
    layout = world.lay_out("""
merge_method: spherical_mean
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
parameters:
  weight: [{filter: layers.1., value: 11}, {filter: layers.2., value: 12}, {value: 0}]
  normalize: [{filter: layers.2., value: false}]
""")
    assert weights(layout) == [0, 11, 11, 12]
    flags = [by_name(layout)[f"model.layers.{i}{UP}"].parameters["normalize"] for i in range(4)]
    assert flags == [True, True, False, True]  # layer 3 falls through to the default


def test_the_scale_trick_of_layers_without_effect(world):
    world.model("a", decoder(3, (".self_attn.o_proj.weight", ".mlp.down_proj.weight", UP)))
    layout = world.lay_out("""
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: a
        layer_range: [2, 3]
        parameters:
          scale: [{filter: o_proj, value: 0}, {filter: down_proj, value: 0.0}, {value: 1.0}]
""")
    at = "model.layers.3"
    scales = {n: a.parameters["scale"] for n, a in by_name(layout).items() if n.startswith(at)}
    assert scales == {
        f"{at}.self_attn.o_proj.weight": [0],
        f"{at}.mlp.down_proj.weight": [0],
        f"{at}{UP}": [1],
    }
    assert layout.config["num_hidden_layers"] == 4
    assert by_name(layout)[HEAD].parameters["scale"] == [1]


def test_a_parameter_without_a_value_is_named(world):
    for name in "ab":
        world.model(name, decoder(1))
    head = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
    with pytest.raises(
        ValueError, match=r"slerp: parameter 't' has no value for tensor 'lm_head.weight'"
    ):
        world.lay_out(head + "parameters: {t: [{filter: mlp, value: 1}]}\n")
    with pytest.raises(ValueError, match=r"linear: parameter 'weight' of b has no value for tens"):
        world.lay_out(
            "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}},"
            " {model: b, parameters: {weight: [{filter: mlp, value: 1}]}}]\n"
        )


def test_filters_that_match_nothing_are_noted(world):
    world.model("a", decoder(1))
    layout = world.lay_out(
        "merge_method: linear\nmodels: [{model: a}]\n"
        "parameters: {weight: [{filter: mpl, value: 1}, {filter: mlp, value: 1}, {value: 1}]}\n"
    )
    assert layout.notes == ["filter 'mpl' matches no tensor"]


def test_values_are_bound_for_the_models_of_each_tensor(world):
    for name in ("base", "a", "b"):
        world.model(name, decoder(2))
    layout = world.lay_out("""
merge_method: ties
base_model: base
slices:
  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]
  - sources: [{model: b, layer_range: [1, 2]}]
parameters: {weight: 1, lambda: 1/n, density: [0.5, 0.75]}
""")
    lams = {name: a.parameters["lam"] for name, a in by_name(layout).items()}
    assert lams[f"model.layers.0{UP}"] == 0.5 and lams[f"model.layers.1{UP}"] == 1
    assert by_name(layout)[f"model.layers.1{UP}"].parameters["density"] == [0.75]
    assert all(a.parameters["normalize"] is True for a in layout.assignments)


# Whole models


def test_whole_models(world):
    for name in ("base", "a", "b"):
        world.model(name, decoder(2))
    text = "merge_method: ties\nbase_model: base\nmodels: [%s]\nparameters: {weight: 1}\n"
    layout = world.lay_out(text % "{model: a}, {model: base}, {model: b}")
    order = CheckpointSource("base").names
    assert [a.name for a in layout.assignments] == order
    assert all(a.base == a.name for a in layout.assignments)
    assert origins(layout) == {n: [f"a:{n}", f"b:{n}"] for n in order}
    assert not layout.left_out and not layout.leftovers and not layout.notes
    assert world.lay_out(text % "{model: a}, {model: b}").assignments == layout.assignments
    noted = world.lay_out(text % "{model: base, parameters: {weight: 1}}, {model: b}")
    assert noted.notes == ["the base's own parameters have no effect: weight"]


def test_a_base_that_only_leads(world):
    for name in ("base", "a"):
        world.model(name, decoder(1))
    layout = world.of_spec(MergeSpec.of_models("linear", ["a"], "base", {"weights": 1}))
    assert all(a.base == a.name for a in layout.assignments)
    assert origins(layout)[HEAD] == [f"a:{HEAD}"]


@pytest.mark.parametrize("prefix", ["transformer.h.", "gpt_neox.layers.", "odd.names."])
def test_layers_are_found_under_any_name(world, prefix):
    names = [f"{prefix}{i}.experts.{e}.w" for i in range(3) for e in range(2)] + ["wte.weight"]
    for name in "ab":
        world.model(name, names, num_hidden_layers=3)
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [1, 3]}\n"
    found = {n: a.parameters["weights"][0] for n, a in by_name(world.lay_out(text)).items()}
    assert [found[f"{prefix}{i}.experts.1.w"] for i in range(3)] == [1, 2, 3]
    assert found["wte.weight"] == 1


def test_every_stack_has_its_own_positions(world):
    names = [f"{stack}.{i}.w" for stack in ("vision.blocks", "model.layers") for i in range(3)]
    names += ["model.layers.3.w", "model.layers.4.w", "projector.0.w", "projector.2.w"]
    world.model("a", names)
    text = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [0, 1]}\n"
    found = {n: a.parameters["weights"][0] for n, a in by_name(world.lay_out(text)).items()}
    assert [found[f"vision.blocks.{i}.w"] for i in range(3)] == [0, 0.5, 1]
    assert [found[f"model.layers.{i}.w"] for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert found["projector.2.w"] == 0


def test_tensors_one_model_has_alone(world):
    world.model("a", decoder(1))
    world.model("b", [*decoder(1), "extra.weight"])
    text = "merge_method: linear\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 1}\n"
    layout = world.lay_out(text % ("a", "b"))
    assert {m.name: names for m, names in layout.leftovers.items()} == {"b": ["extra.weight"]}
    with pytest.raises(CheckpointError, match=r"a has no tensor 'extra.weight', which b has"):
        world.lay_out(text % ("b", "a"))
    world.model("b", decoder(2))
    with pytest.raises(CheckpointError, match="b has 2 layers, a has 1"):
        world.lay_out(text % ("a", "b"))


def test_rotary_tables_of_some_models_are_left_out(world):
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    world.model("a", decoder(1))
    world.model("b", [*decoder(1), table])
    text = "merge_method: linear\nmodels: [{model: %s}, {model: %s}]\nparameters: {weight: 1}\n"
    for order in (("a", "b"), ("b", "a")):
        layout = world.lay_out(text % order)
        assert table not in by_name(layout) and not layout.leftovers
        ((model, reasons),) = layout.left_out.items()
        assert model.name == "b" and reasons == {table: "a table that config.json determines"}
    world.model("a", [*decoder(1), table])
    assert table in by_name(world.lay_out(text % ("a", "b")))


def test_kinds_must_agree_unless_crimes_are_allowed(world):
    world.model("a", decoder(1))
    world.model("b", decoder(1), model_type="mistral")
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    with pytest.raises(CheckpointError, match="b is a mistral model, a a llama model; only models"):
        world.lay_out(text)
    assert world.lay_out(text, allow_crimes=True).assignments


# Tied heads


def test_tied_heads_of_whole_models(world):
    world.model("a", decoder(1, head=False), tie_word_embeddings=True)
    world.model("b", decoder(1, head=False), tie_word_embeddings=True)
    text = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: [%s]}\n"
    layout = world.lay_out(text % "1, 2")
    assert HEAD not in by_name(layout) and layout.config["tie_word_embeddings"] is True
    world.model("b", decoder(1))
    layout = world.lay_out(text % "{filter: lm_head, value: 3}, {value: 1}")
    assert origins(layout)[HEAD] == [f"a:{EMBEDDING}", f"b:{HEAD}"]
    assert by_name(layout)[HEAD].parameters["weights"] == [3, 3]  # the filter sees the head
    assert layout.config["tie_word_embeddings"] is False and not layout.leftovers


def test_tied_heads_in_slices(world):
    text = (
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 1]}]\n"
        "  - sources: [{model: b, layer_range: [1, 2]}]\n"
    )
    for name in "ab":
        world.model(name, decoder(2, head=False), tie_word_embeddings=True)
    layout = world.lay_out(text)
    assert origins(layout)[EMBEDDING] == [f"a:{EMBEDDING}"] and HEAD not in origins(layout)
    assert layout.notes == [
        "the head is tied to model.embed_tokens.weight, so it too comes from the first slice's "
        "models"
    ]
    world.model("a", decoder(2))  # with a head of its own: b's embedding is the last slice's head
    layout = world.lay_out(text)
    assert origins(layout)[HEAD] == [f"b:{EMBEDDING}"] and not layout.leftovers
    assert layout.config["tie_word_embeddings"] is False


# Slices


def test_slices_stack_layers(world):
    """The card's example: [0, 2) of p and [1, 3) of q give p0, p1, q1, q2."""
    for name in "pq":
        world.model(name, decoder(3))
    layout = world.lay_out(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: p, layer_range: [0, 2]}]\n"
        "  - sources: [{model: q, layer_range: [1, 3]}]\n"
    )
    found = origins(layout)
    assert [found[f"model.layers.{i}{UP}"] for i in range(4)] == [
        [f"p:model.layers.0{UP}"],
        [f"p:model.layers.1{UP}"],
        [f"q:model.layers.1{UP}"],
        [f"q:model.layers.2{UP}"],
    ]
    assert found[EMBEDDING] == [f"p:{EMBEDDING}"]
    assert found[NORM] == [f"q:{NORM}"] and found[HEAD] == [f"q:{HEAD}"]
    assert sorted(found) == sorted(decoder(4))
    assert next(iter(found)) == EMBEDDING and set(list(found)[-2:]) == {NORM, HEAD}
    assert layout.config["num_hidden_layers"] == 4 and not layout.leftovers
    reasons = {m.name: r for m, r in layout.left_out.items()}
    assert reasons == {
        "p": {
            f"model.layers.2{Q}": "layer 2 is in no slice",
            f"model.layers.2{UP}": "layer 2 is in no slice",
            NORM: "it comes from the last slice's models",
            HEAD: "it comes from the last slice's models",
        },
        "q": {
            f"model.layers.0{Q}": "layer 0 is in no slice",
            f"model.layers.0{UP}": "layer 0 is in no slice",
            EMBEDDING: "it comes from the first slice's models",
        },
    }


def test_a_base_in_slices(world):
    """Listed, it has its own range; else that of the slice's first source."""
    for name in ("base", "a", "b"):
        world.model(name, decoder(6))
    layout = world.lay_out("""
merge_method: task_arithmetic
base_model: base
slices:
  - sources: [{model: a, layer_range: [2, 4]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: a, layer_range: [4, 5]}, {model: base, layer_range: [0, 1]}]
parameters: {weight: 1}
""")
    named = by_name(layout)
    assert [named[f"model.layers.{i}{UP}"].base for i in range(3)] == [
        f"model.layers.{i}{UP}" for i in (2, 3, 0)
    ]
    assert origins(layout)[f"model.layers.1{UP}"] == [
        f"a:model.layers.3{UP}",
        f"b:model.layers.1{UP}",
    ]
    assert origins(layout)[f"model.layers.2{UP}"] == [f"a:model.layers.4{UP}"]
    assert origins(layout)[EMBEDDING] == [f"a:{EMBEDDING}", f"b:{EMBEDDING}"]
    assert origins(layout)[HEAD] == [f"a:{HEAD}"] and named[HEAD].base == HEAD


def test_a_base_that_slices_do_not_look_at(world):
    for name in ("base", "a"):
        world.model(name, decoder(2), marker=name)
    layout = world.lay_out(
        "merge_method: passthrough\nbase_model: base\nslices:\n"
        "  - sources: [{model: a, layer_range: [0, 1]}]\n"
    )
    assert all(a.base is None for a in layout.assignments) and not layout.leftovers
    reasons = {m.name: set(r.values()) for m, r in layout.left_out.items()}
    assert reasons["base"] == {"passthrough does not look at the base"}
    assert layout.config["marker"] == "base" and layout.config["num_hidden_layers"] == 1


def dense_first(dense, layers):
    """A layout with ``dense`` first layers, and experts in the others."""

    def rests(i):
        experts = [".mlp.gate.weight", *(f".mlp.experts.{e}.up_proj.weight" for e in range(3))]
        return [Q, UP] if i < dense else [Q, *experts]

    return decoder(layers, rests)


def test_layers_may_differ_within_a_model(world):
    names = dense_first(2, 5)
    for name in "ab":
        world.model(name, names, first_k_dense_replace=2)
    whole = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
    assert sorted(by_name(world.lay_out(whole))) == sorted(names)
    layout = world.lay_out(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: a, layer_range: [1, 4]}]\n"
        "  - sources: [{model: b, layer_range: [3, 5]}]\n"
    )
    assert sorted(by_name(layout)) == sorted(dense_first(1, 5))
    assert layout.config["first_k_dense_replace"] == 1
    with pytest.raises(CheckpointError, match=r"first_k_dense_replace = 2 cannot be carried over"):
        world.lay_out(
            "merge_method: passthrough\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 4]}]\n"
            "  - sources: [{model: b, layer_range: [1, 5]}]\n"
        )
    with pytest.raises(
        CheckpointError,
        match=r"layer 2 of b has no 'mlp.up_proj.weight', which layer 1 of a has: they are diff",
    ):
        world.lay_out(
            "merge_method: linear\nslices:\n"
            "  - sources: [{model: a, layer_range: [1, 3]}, {model: b, layer_range: [2, 4]}]\n"
            "parameters: {weight: 1}\n"
        )


def test_layers_that_predict_further_tokens_are_left_out_of_slices(world):
    names = decoder(5)
    world.model("a", names, num_hidden_layers=4, num_nextn_predict_layers=1)
    layout = world.lay_out(
        "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]\n"
    )
    assert layout.config["num_hidden_layers"] == 4
    assert layout.config["num_nextn_predict_layers"] == 0
    (reasons,) = layout.left_out.values()
    assert set(reasons.values()) == {"it comes after the 4 layers proper"} and len(reasons) == 2
    whole = "merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: [0, 1]}\n"
    layout = world.lay_out(whole)
    assert sorted(by_name(layout)) == sorted(names)
    assert weights(layout) == pytest.approx([0, 1 / 3, 2 / 3, 1, 0])


SLICES = (
    "merge_method: passthrough\nslices:\n"
    "  - sources: [{model: a, layer_range: [0, 3]}]\n"
    "  - sources: [{model: a, layer_range: [1, 4]}]\n"
)
CONFIGS = [
    (
        {"layer_types": ["s", "s", "f", "s"], "sliding_window_pattern": 3},
        {"layer_types": ["s", "s", "f", "s", "f", "s"]},
    ),
    ({"mlp_only_layers": [1, 3]}, {"mlp_only_layers": [1, 3, 5]}),
    (
        {"mlp_only_layers": [3], "decoder_sparse_step": 2},
        {"mlp_only_layers": [0, 2, 4, 5], "decoder_sparse_step": 1},
    ),
    ({"mlp_only_layers": [], "decoder_sparse_step": 1}, {"mlp_only_layers": []}),
    ({"max_window_layers": 4, "use_sliding_window": False}, {"max_window_layers": 4}),
    ({"max_window_layers": 1, "use_sliding_window": True}, {"max_window_layers": 1}),
    ({"max_window_layers": 2, "use_sliding_window": True}, None),
    ({"max_window_layers": 4, "use_sliding_window": True}, {"max_window_layers": 6}),
    ({"first_k_dense_replace": 0}, {"first_k_dense_replace": 0}),
    (
        {"moe_layer_start_index": 1, "moe_layer_end_index": 3},
        {"moe_layer_start_index": 1, "moe_layer_end_index": 5},
    ),
    ({"moe_layer_end_index": 2}, {"moe_layer_end_index": 4}),
    ({"moe_layer_end_index": -1}, {"moe_layer_end_index": -1}),
    ({"moe_layer_start_index": 2}, None),
    ({"sliding_window_pattern": 2}, {"sliding_window_pattern": 2}),
    ({"sliding_window_pattern": 3}, None),
    ({"attn_layer_period": 2, "attn_layer_offset": 0}, {"attn_layer_period": 2}),
    ({"attn_layer_period": 3, "attn_layer_offset": 0}, None),
    ({"hybrid_override_pattern": "M*-M"}, {"hybrid_override_pattern": "M*-*-M"}),
    ({"num_key_value_heads": [1, 2, 3, 4]}, {"num_key_value_heads": [1, 2, 3, 2, 3, 4]}),
    ({"some_layer_flags": [1, 2, 3, 4]}, {"some_layer_flags": [1, 2, 3, 2, 3, 4]}),
    ({"some_layers": [1, 2, 3]}, None),
    ({"num_kv_shared_layers": 2}, None),
    ({"odd_layer_interval": 2}, None),
    ({"eos_token_id": [1, 2, 3, 4]}, {"eos_token_id": [1, 2, 3, 4]}),
]


@pytest.mark.parametrize("config, expected", CONFIGS, ids=lambda c: json.dumps(c))
def test_the_configuration_follows_the_layers(world, config, expected):
    world.model("a", decoder(4), **config)
    same = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]\n"
    assert config.items() <= world.lay_out(same).config.items()
    if expected is None:
        with pytest.raises(CheckpointError, match=r"config.json: \w+ = .* cannot be carried over"):
            world.lay_out(SLICES)
        return
    out = world.lay_out(SLICES).config
    assert out["num_hidden_layers"] == 6
    assert expected.items() <= out.items()


def test_layers_of_different_kinds_do_not_merge(world):
    for name, kinds in (("a", ["s", "f"]), ("b", ["f", "s"])):
        world.model(name, decoder(2), layer_types=kinds)
    with pytest.raises(
        CheckpointError, match=r"layer 0 of b cannot be merged with layer 0 of a: by layer_types"
    ):
        world.lay_out(
            "merge_method: linear\nslices:\n"
            "  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [0, 1]}]\n"
            "parameters: {weight: 1}\n"
        )


def test_slices_that_cannot_be(world):
    world.model("a", decoder(2))
    text = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [1, 3]}]}]\n"
    with pytest.raises(CheckpointError, match=r"layer_range \[1, 3\] goes past the 2 layers of a"):
        world.lay_out(text)
    text = text.replace("[1, 3]", "[1, 2]")
    world.model("a", [EMBEDDING, NORM])
    with pytest.raises(CheckpointError, match="expected one stack of layers to take slices from"):
        world.lay_out(text)
    world.model("a", decoder(2), num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"nowhere says that there are 2 layers model.layers"):
        world.lay_out(text)
    world.model("a", [*decoder(2), "vision_tower.layers.0.w"])
    with pytest.raises(CheckpointError, match="a is made of text_decoder, vision_tower; put each"):
        world.lay_out(text)


# Modules

COMPOSITE = [
    "model.language_model.embed_tokens.weight",
    *(f"model.language_model.layers.{i}{UP}" for i in range(3)),
    "model.language_model.norm.weight",
    HEAD,
    *(f"model.vision_tower.layers.{i}.w" for i in range(2)),
    "model.multi_modal_projector.linear.weight",
]


def test_modules(world):
    parts = {"text_config": {"num_hidden_layers": 3}, "vision_config": {"num_hidden_layers": 2}}
    for name in "ab":
        world.model(name, COMPOSITE, num_hidden_layers=None, **parts)
    text = """
merge_method: linear
modules:
  text_decoder:
    slices:
      - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
      - sources: [{model: b, layer_range: [1, 3]}]
  vision_tower:
    models: [{model: a}]
  multi_modal_projector:
    models: [{model: a}]
parameters: {weight: [1, 2]}
"""
    layout = world.lay_out(text)
    found = origins(layout)
    layers = [f"model.language_model.layers.{i}{UP}" for i in range(4)]
    assert found[layers[1]] == [f"a:{layers[1]}", f"b:{layers[1]}"]
    assert found[layers[3]] == [f"b:{layers[2]}"]
    assert found["model.vision_tower.layers.1.w"] == ["a:model.vision_tower.layers.1.w"]
    assert by_name(layout)["model.vision_tower.layers.1.w"].parameters["weights"] == [2]
    assert layout.config["text_config"]["num_hidden_layers"] == 4
    assert layout.config["vision_config"]["num_hidden_layers"] == 2
    assert not layout.leftovers
    ((_, reasons),) = [item for item in layout.left_out.items() if item[0].name == "b"]
    assert reasons["model.vision_tower.layers.0.w"] == (
        "module vision_tower takes nothing from this model"
    )
    cut = text[: text.index("  multi")] + text[text.index("parameters") :]
    leftovers = {m.name: names for m, names in world.lay_out(cut).leftovers.items()}
    assert leftovers == {m: ["model.multi_modal_projector.linear.weight"] for m in "ab"}
    default = text.replace("multi_modal_projector", "default")
    assert origins(world.lay_out(default)) == found
    with pytest.raises(CheckpointError, match="a has no tensors of module 'audio_tower'"):
        world.lay_out(text.replace("multi_modal_projector", "audio_tower"))


def test_statistics_go_with_their_models(world, tmp_path):
    for name in "ab":
        world.model(name, decoder(1))
        (tmp_path / f"stats_{name}").mkdir()
    layout = world.lay_out(
        "merge_method: fisher\nmodels: [{model: a, parameters: {fisher_info: stats_a}}, {model: b}]"
    )
    first = layout.assignments[0]
    assert first.statistics[0].samefile(tmp_path / "stats_a") and first.statistics[1] is None
