# ruff: noqa: RUF001
"""Small tokenizers of every common kind, made here."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

WORDS = ("hello", "world", "ferry", "river", "一", "二")
MARKS = (".", ",", "?", "!", ";", ":", "。", "，", "|")


class ListedWords:
    """A token is a word of a list; they are joined without spaces."""

    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str, **options: Any) -> list[int]:
        return [self.words.index(text)]

    def decode(self, token_ids: list[int], **options: Any) -> str:
        return "".join(self.words[i] for i in token_ids)


def hugging_face(backend: Any, **options: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, **options)


def wordpiece(cleanup: bool, words: tuple[str, ...] = WORDS, **options: Any) -> Any:
    """BERT's kind. The decoder puts a space before all that does not begin with "##"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["[UNK]", "[SEP]", *words, "##ing", "##,", *MARKS]
    backend = Tokenizer(
        models.WordPiece(dict(zip(pieces, range(99), strict=False)), unk_token="[UNK]")
    )
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=cleanup)
    return hugging_face(backend, **options)


def sentencepiece(kind: str) -> Any:
    """Llama's kind, "bpe", or XLM-R's, "unigram", with bytes for what has no piece."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁hello", "▁", "▁▁", "h", "e", "l", "o", "▁,", "▁.", *MARKS, "d."]
    if kind == "bpe":
        vocab = {piece: i for i, piece in enumerate(pieces)}
        backend = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
        backend.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        scored = [(piece, -1.0) for piece in pieces]
        backend = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=True))
        backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.add_special_tokens(["<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return hugging_face(backend)


def byte_level(alphabet: str | None = None, **options: Any) -> Any:
    """GPT-2's kind: every byte, or those of ``alphabet`` alone, and some merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    if alphabet is not None:
        letters, merges = sorted(alphabet), []
    else:
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        merges = [("Ġ", ","), ("Ġ", "."), ("Ċ", "Ċ"), ("ã", "Ģ"), ("ãĢ", "Ĥ"), ("h", "e")]
    vocab = {piece: i for i, piece in enumerate([*letters, *(a + b for a, b in merges)])}
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    return hugging_face(backend, **options)


def characters(alphabet: str, first_id: int = 0) -> Any:
    """A token per character and no decoder, so that a text is its pieces with spaces between."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocab = {char: first_id * (i > 0) + i for i, char in enumerate(alphabet)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token=alphabet[0]))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return hugging_face(backend)


def write_tekken(folder: Path, vocab_size: int = 300) -> None:
    """Mistral's kind: every byte and some words, behind 20 special tokens."""
    words = [bytes([byte]) for byte in range(256)]
    words += [b" ,", b" .", b"\n\n", "。".encode(), "，".encode(), b"he", b"ll"]
    vocab = [
        {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
        for i, word in enumerate(words)
    ]
    config = {
        "pattern": r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": len(vocab) + 20,
        "default_num_special_tokens": 20,
        "version": "v3",
    }
    document = {"config": config, "vocab": vocab}
    (folder / "tekken.json").write_text(json.dumps(document))
