"""Small trained tokenizers, and model folders around them."""

import json

import torch
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mergeme_ext.io.operands import Stored
from mergeme_ext.vocabulary import VocabularyInput

FOX = ["the quick brown fox jumps over the lazy dog", "the quick fox"]
LOREM = ["lorem ipsum dolor sit amet the lorem ipsum", "dolor sit"]
SPHINX = ["sphinx of black quartz judge my vow", "black sphinx of the quartz"]
TEXTS = [
    "the quick brown fox",
    "lorem ipsum dolor sit amet",
    "sphinx of black quartz, judge my vow!",
    "Grüße, 東京 \U0001f98a and    spaces\n\tTabs",
    "",
    "a<s>b</s> <|im_start|>user",
]


def byte_bpe(lines=FOX, size=290, special=("<s>", "</s>")):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines * 3, trainer)
    return tokenizer


def byte_fallback_bpe(lines=FOX, size=340, special=("<unk>", "<s>", "</s>")):
    """As SentencePiece's BPE is converted: a mark for spaces, unknown letters as bytes."""
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=[*special, *fallback], show_progress=False
    )
    words = [f" {word}" for line in lines * 3 for word in line.split()]
    tokenizer.train_from_iterator(words, trainer)
    document = json.loads(tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] in special]
    return Tokenizer.from_str(json.dumps(document))


def word_piece(lines=FOX, size=60, special=("[UNK]", "[CLS]", "[SEP]")):
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=list(special), show_progress=False
    )
    tokenizer.train_from_iterator(lines * 3, trainer)
    ends = [(t, tokenizer.token_to_id(t)) for t in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return tokenizer


def unigram(lines=FOX, size=45, special=("<unk>", "<s>", "</s>")):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=list(special), unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(lines * 20, trainer)
    return tokenizer


KINDS = {
    "byte_bpe": (byte_bpe, 280),
    "byte_fallback_bpe": (byte_fallback_bpe, 300),
    "word_piece": (word_piece, 60),
    "unigram": (unigram, 40),
}


def added(tokenizer, *tokens, special=True, **flags):
    tokens = [AddedToken(t, special=special, normalized=False, **flags) for t in tokens]
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(tokens)
    return tokenizer


def save(folder, tokenizer, rows=None, config=None, label=None, **tokenizer_config):
    """Write the folder of a model with ``rows`` rows; return its part in a plan."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    rows = rows or len(tokenizer.get_vocab())
    config = {"model_type": "llama", "vocab_size": rows, **(config or {})}
    (folder / "config.json").write_text(json.dumps(config))
    return VocabularyInput(label or folder.name, folder, rows, config)


def matrices(inputs, width=3, dtype=torch.float32):
    """Embeddings whose rows tell where they come from."""
    out = []
    for m, model in enumerate(inputs):
        g = torch.Generator().manual_seed(m)
        out.append(torch.randn(model.rows, width, generator=g, dtype=torch.float64).to(dtype))
    return out


def stored(tensors):
    return [Stored(t) for t in tensors]


class Computed:
    """An operand that is not stored, and remembers the stretches asked for."""

    def __init__(self, tensor):
        self.tensor, self.dtype, self.shape = tensor, tensor.dtype, tuple(tensor.shape)
        self.asked, self.calls = [], []

    def stored(self):
        return None

    def rows(self, begin, end):
        assert 0 <= begin <= end <= self.shape[0]
        self.asked.append((begin, end))
        return self.tensor[begin:end].clone()

    def prefetch(self):
        self.calls.append("prefetch")

    def release(self):
        self.calls.append("release")


class Folder:
    """Stands in for an open sink."""

    def __init__(self, path):
        self.path = path
        path.mkdir()

    def write_text(self, name, text):
        with (self.path / name).open("x", encoding="utf-8") as file:
            file.write(text)

    def copy_file(self, source, name=None):
        with (self.path / (name or source.name)).open("xb") as file:
            file.write(source.read_bytes())
