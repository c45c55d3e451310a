import json

import pytest
from transformers import AutoTokenizer

from mergeme_ext.vocabulary import CHAT_TEMPLATES, VocabularyError, resolve_chat_template
from python_tests.vocabulary.models import byte_bpe, save

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
]
# As the formats are documented, with <s> and </s> for the model's own begin and end of text.
EXPECTED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello.[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello.</s>[INST] Bye [/INST]",
}


def load(tmp_path, template, **settings):
    save(tmp_path / "m", byte_bpe(), bos_token="<s>", eos_token="</s>", **settings)
    (tmp_path / "m/chat_template.jinja").write_text(template)
    return AutoTokenizer.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_formats(tmp_path, name):
    file, template = resolve_chat_template(name, [])
    assert file == "chat_template.jinja"
    tokenizer = load(tmp_path, template)
    prompt = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert prompt == EXPECTED[name]
    without = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=False)
    assert prompt.startswith(without)


def test_exaone_begins_with_an_empty_system_turn(tmp_path):
    tokenizer = load(tmp_path, CHAT_TEMPLATES["exaone"])
    prompt = tokenizer.apply_chat_template(CHAT[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"


@pytest.mark.parametrize("name", ["alpaca", "mistral"])
def test_roles_that_a_format_lacks_are_refused(tmp_path, name):
    tokenizer = load(tmp_path, CHAT_TEMPLATES[name])
    with pytest.raises(Exception, match="no role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_the_file_wins_over_a_template_in_the_config(tmp_path):
    tokenizer = load(tmp_path, CHAT_TEMPLATES["chatml"], chat_template="{{ 'old' }}")
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False).startswith("<|im_start|>")


def test_auto_takes_the_most_frequent(tmp_path):
    folders = [tmp_path / name for name in "abcde"]
    for folder in folders:
        folder.mkdir()
    a, b, c, d, _ = folders
    (a / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ 1 }}"}))
    (b / "chat_template.json").write_text(json.dumps({"chat_template": "{{ 2 }}"}))
    (c / "chat_template.jinja").write_text("{{ 2 }}")
    named = [
        {"name": "tool_use", "template": "{{ 3 }}"},
        {"name": "default", "template": "{{ 1 }}"},
    ]
    (d / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert resolve_chat_template("auto", folders)[1] == "{{ 1 }}"  # a tie: the first one found
    assert resolve_chat_template("auto", folders[1:])[1] == "{{ 2 }}"
    with pytest.raises(VocabularyError, match="none of the models has a chat template"):
        resolve_chat_template("auto", folders[4:])


def test_texts(tmp_path):
    assert resolve_chat_template("{{ messages }}", []) == ("chat_template.jinja", "{{ messages }}")
    with pytest.raises(VocabularyError, match=r"alpaca, chatml, .* got 'chatlm'"):
        resolve_chat_template("chatlm", [])
