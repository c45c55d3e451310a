import pytest

from mergeme_ext.io.hub import cached_model, is_hub_name


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for variable in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    hub = tmp_path / "huggingface/hub"
    model = hub / "models--owner--name"
    for commit in ("c1", "c2"):
        (model / "snapshots" / commit).mkdir(parents=True)
    (model / "refs/pr").mkdir(parents=True)
    (model / "refs/main").write_text("c1\n")
    (model / "refs/pr/3").write_text("c2")
    (hub / "models--old/snapshots/c3").mkdir(parents=True)
    return hub


def test_finds_snapshots(cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    snapshots = cache / "models--owner--name/snapshots"
    assert cached_model("owner/name") == snapshots / "c1"
    assert cached_model("owner/name", "pr/3") == snapshots / "c2"
    assert cached_model("owner/name", "c2") == snapshots / "c2"
    assert cached_model("old", "c3").is_dir()
    for missing in (("old",), ("owner/other",), ("owner/name", "v9"), ("owner/name", "")):
        assert cached_model(*missing) is None


@pytest.mark.parametrize("variable, up", [("HF_HOME", 0), ("XDG_CACHE_HOME", 1)])
def test_where_the_cache_is(cache, monkeypatch, variable, up):
    monkeypatch.setenv(variable, str(cache.parents[up]))
    assert cached_model("owner/name").is_dir()
    monkeypatch.setenv("HF_HUB_CACHE", str(cache / "elsewhere"))
    assert cached_model("owner/name") is None


@pytest.mark.parametrize("name", ["../x", "a/b/c", "/etc", "", "a/..", "a//b"])
def test_other_paths_are_no_names(cache, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    assert not is_hub_name(name) and cached_model(name) is None
    assert cached_model("owner/name", "../snapshots/c1") is None
