import os
from pathlib import Path

import pytest

from mergeme_ext.io import licence_of

MIT = (
    "MIT License\n\nPermission is hereby granted, free of charge, to any person obtaining a copy\n"
)


def card(front):
    return f"---\n{front}\n---\n# A model\n"


CARDS = {
    "plain": ("license: apache-2.0\ntags: [x]", "apache-2.0"),
    "list": ("license:\n- mit\n- cc-by-4.0", "mit, cc-by-4.0"),
    "other": ("license: other\nlicense_name: Tongyi\n  Qianwen", "other (Tongyi Qianwen)"),
    "other, unnamed": ("license: other", "other"),
    "spaces": ("license: '  mit\n\n  '", "mit"),
    "none": ("tags: [x]", None),
    "empty": ("license:", None),
    "number": ("license: 3", None),
    "no mapping": ("- license", None),
    "no YAML": ("license: [", None),
    "a date that is none": ("license: mit\ndate: 2024-13-45", None),
}


@pytest.mark.parametrize("case", CARDS)
def test_front_matter(tmp_path, case):
    front, wanted = CARDS[case]
    (tmp_path / "README.md").write_text(card(front))
    assert licence_of(tmp_path) == wanted
    (tmp_path / "LICENSE").write_text(MIT)
    assert licence_of(tmp_path) == (wanted or "mit")


def test_front_matter_only_counts_at_the_start(tmp_path):
    (tmp_path / "README.md").write_text("# A model\n" + card("license: mit"))
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: mit\n")  # never closed
    assert licence_of(tmp_path) is None
    (tmp_path / "README.md").write_bytes(b"\xef\xbb\xbf---\r\nlicense: mit\r\n---\r\n")
    assert licence_of(tmp_path) == "mit"


@pytest.mark.parametrize(
    "text, wanted",
    [
        (MIT, "mit"),
        ("LLAMA 3.1 COMMUNITY LICENSE AGREEMENT\n", "llama3.1"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT\n", "llama3"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("                    GNU GENERAL PUBLIC LICENSE\n   Version 3, 29 June 2007", "gpl-3.0"),
        ("Gemma Terms of Use\n", "gemma"),
        ("You may not.", "other"),
        ("  \n", None),
    ],
)
def test_texts(tmp_path, text, wanted):
    (tmp_path / "LICENSE.txt").write_text(text)
    assert licence_of(tmp_path) == wanted


def test_our_own_licence():
    root = Path(__file__).parents[2]
    assert licence_of(root) == "apache-2.0"


def test_odd_folders(tmp_path):
    assert licence_of(tmp_path / "nowhere") is None
    os.mkfifo(tmp_path / "LICENSE")
    (tmp_path / "README.md").mkdir()
    assert licence_of(tmp_path) is None
