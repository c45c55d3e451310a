import pytest

from mergeme_ext.recipes import RecipeError, as_number, load_recipe, load_recipes


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def load(text):
        (tmp_path / "r.yaml").write_text(text)
        return load_recipe("r.yaml")

    return load


def test_reads_every_kind(recipe, tmp_path):
    (tmp_path / "m").mkdir()
    r = recipe(
        "t: word\nn: 1e-3\ni: 7\nb: true\nl: [a, b]\ns: {x: 1}\nss: [{y: 2}, {y: 3}]\nf: ./m\n"
    )
    assert r.text("t") == "word" and r.text("t", choices=["word"]) == "word"
    assert r.number("n") == 0.001 and r.number("i") == 7.0
    assert r.integer("i") == 7 and r.boolean("b") is True
    assert r.texts("l") == ["a", "b"]
    assert r.section("s").integer("x") == 1
    assert [s.integer("y") for s in r.sections("ss")] == [2, 3]
    assert r.sections("ss")[1].where == "ss[1]" and r.sections("ss")[1].line == 7
    assert r.folder("f").samefile(tmp_path / "m")
    assert r.section("none") is None and "t" in r and "none" not in r
    assert r.text("none", None) is None and r.number("none", 2.0) == 2.0
    assert r.integer("none", 1) == 1 and r.boolean("none", False) is False
    assert r.texts("none", []) == [] and r.folder("none", None) is None


def test_documents_and_merge_keys(tmp_path):
    (tmp_path / "r.yaml").write_text(
        "---\na: &x {p: 1, q: 2}\n---\nb: &y {q: 3, r: 4}\nc: {<<: *y, r: 5}\n---\n"
    )
    first, second = load_recipes(tmp_path / "r.yaml")
    assert first.section("a").integer("q") == 2 and second.line == 4
    merged = second.section("c")
    assert (merged.integer("q"), merged.integer("r")) == (3, 5)
    merged.allow_only(["q", "r"])


def test_errors_inside_values(recipe):
    r = recipe("a:\n  - {x: [1,\n    2]}\n")
    error = r.error_inside("a", (0, "x", 1), "expected", " to be odd")
    assert str(error) == "r.yaml:3: expected a[0].x[1] to be odd"
    assert str(r.error_inside("a", (), "no", "!")) == "r.yaml:1: no a!"


def test_folder_is_looked_up_from_the_recipe_first(tmp_path, monkeypatch):
    for place in ("here", "there"):
        (tmp_path / place / "m").mkdir(parents=True)
    (tmp_path / "here" / "only").mkdir()
    (tmp_path / "there" / "r.yaml").write_text("a: m\nb: only\n")
    monkeypatch.chdir(tmp_path / "here")
    r = load_recipe(tmp_path / "there" / "r.yaml")
    assert r.folder("a").samefile(tmp_path / "there" / "m")
    assert r.folder("b").samefile(tmp_path / "here" / "only")


ERRORS = [
    ("a: [1", lambda r: r, r"r.yaml:1: not valid YAML"),
    ("a: 1\n\tb: 2", lambda r: r, r"r.yaml:2: not valid YAML"),
    ("", lambda r: r, r"r.yaml:1: the recipe is empty"),
    ("- a", lambda r: r, r"r.yaml:1: expected the recipe to be a mapping, got a list"),
    ("a: 1\n---\nb: 2", lambda r: r, r"r.yaml:3: expected one document, got another"),
    ("s: &x {a: 1}\nt: {<<: [*x, 3]}", lambda r: r.section("t"), r"t.<< to be a mapping, got '3'"),
    ("a: 1\nb: 2\na: 3", lambda r: r, r"r.yaml:3: key 'a' appears twice"),
    ("[1, 2]: 3", lambda r: r, r"expected a word as key, got a list"),
    (
        "a: 1\ndensty: 2",
        lambda r: r.allow_only(["a", "density"]),
        r"r.yaml:2: unknown key 'densty'; did you mean 'density'\?",
    ),
    ("a: 1\nqq: 2", lambda r: r.allow_only(["a", "b"]), "r.yaml:2: unknown key 'qq'; known are a"),
    ("s:\n  x: 1", lambda r: r.section("s").allow_only([]), r"r.yaml:2: unknown key 'x' in s$"),
    ("a: 1", lambda r: r.allow_only([], refused={"a": "not yet"}), "r.yaml:1: key 'a': not yet"),
    ("a: 1", lambda r: r.text("b"), "r.yaml:1: key 'b' is missing"),
    ("a: 1", lambda r: r.sections("b"), "key 'b' is missing"),
    ("a: 1", lambda r: r.text("a"), "expected a to be text, got 1"),
    ("a: ''", lambda r: r.text("a"), "expected a to be text, got ''"),
    ("a: tise", lambda r: r.text("a", choices=["ties", "x"]), "unknown a 'tise'; did you mean"),
    ("a: 3", lambda r: r.text("a", choices=["ties"]), "expected a to be one of ties, got 3"),
    ("a: yes", lambda r: r.number("a"), "expected a to be a finite number, got True"),
    ("a: .nan", lambda r: r.number("a"), "expected a to be a finite number, got nan"),
    ("a: x", lambda r: r.number("a", low=1), "expected a to be a number of at least 1, got 'x'"),
    ("a: 0", lambda r: r.number("a", low=0, high=1, open_low=True), r"a number in \(0, 1\], got 0"),
    ("a: 2", lambda r: r.number("a", high=1), "a number of at most 1, got 2"),
    ("a: 0", lambda r: r.number("a", low=0, open_low=True), "a number above 0, got 0"),
    ("a: 1.5", lambda r: r.integer("a", low=1), "a whole number of at least 1, got 1.5"),
    ("a: true", lambda r: r.integer("a"), "a whole number, got True"),
    ("a: 1", lambda r: r.boolean("a"), "expected a to be true or false, got 1"),
    ("a: [1]", lambda r: r.texts("a"), r"expected a to be a list of texts, got \[1\]"),
    ("a: 1", lambda r: r.section("a"), "expected a to be a mapping, got '1'"),
    ("a:", lambda r: r.section("a"), "expected a to be a mapping, got nothing"),
    ("a: []", lambda r: r.sections("a"), "expected a to be a list of mappings, got an empty list"),
    ("a: [1]", lambda r: r.sections("a"), r"expected a\[0\] to be a mapping, got '1'"),
    ("a: nowhere", lambda r: r.folder("a"), "r.yaml:1: a: found no folder 'nowhere'"),
    ("a: !!python/object/apply:os.system [x]", lambda r: r.value("a"), "determine a constructor"),
    ("a: " + "[" * 2000 + "]" * 2000, lambda r: r.value("a"), "r.yaml.*"),
    ("a: &x [*x]", lambda r: r.text("a"), "expected a to be text, got"),
]


@pytest.mark.parametrize("text, act, message", ERRORS, ids=[m for *_, m in ERRORS])
def test_errors_name_line_and_place(recipe, text, act, message):
    with pytest.raises(RecipeError, match=message):
        act(recipe(text))


def test_unreadable_file(tmp_path):
    with pytest.raises(RecipeError, match=r"none.yaml: cannot read the recipe: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "r.yaml").write_bytes(b"a: \xff")
    with pytest.raises(RecipeError, match="expected a YAML file in UTF-8"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "value, number",
    [(1, 1.0), ("1e-3", 0.001), (True, None), ("x", None), (float("inf"), None), (10**400, None)],
)
def test_numbers(value, number):
    assert as_number(value) == number
