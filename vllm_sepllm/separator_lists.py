# ruff: noqa: RUF001
"""Named lists of separators: ``separators=["default", "cjk", "—"]``.

A list holds the marks that end a sentence, a clause or a line in texts of its kind. A name always
means the list, never the text of that word.
"""

from __future__ import annotations

from collections.abc import Iterable

# The paper's list (SepLLM, arXiv 2412.12094, section 4.1).
DEFAULT_SEPARATORS = (".", ",", "?", "!", ";", ":", " ", "\t", "\n")

# Unicode blocks "CJK Symbols and Punctuation" and "Halfwidth and Fullwidth Forms": ideographic full
# stop and comma, the fullwidth forms of the paper's marks, and the ideographic space.
CJK = ("。", "，", "、", "？", "！", "；", "：", "．", "\u3000")

# Unicode block "Arabic", subheadings "Punctuation": comma, semicolon, question mark, and the full
# stop of Urdu. Full stop, exclamation mark and colon are those of "default".
ARABIC = ("\u060c", "\u061b", "\u061f", "\u06d4")

# Unicode block "Devanagari", "Generic punctuation for scripts of India": danda, double danda.
DEVANAGARI = ("\u0964", "\u0965")

# Thai separates clauses and sentences by spaces (The Unicode Standard, chapter 16.1). Most
# tokenizers join a space with the word behind it, and such a token is no separator.
THAI = (" ", "\n")

# Brackets, ends of statements and of lines in C-like languages and Python (The Python Language
# Reference, "Delimiters"). Tokens such as ");\n" are separators with separator_match="composed".
CODE = ("{", "}", "(", ")", "[", "]", ";", ",", ":", "\n", "\n\n", "\t")

# Blocks of Markdown (CommonMark 0.31: headings, lists, quotes, code, rules, blank lines), and the
# bars of its tables.
MARKDOWN = ("\n", "\n\n", "#", "##", "###", "-", "*", ">", "|", "```", "---")

MULTILINGUAL = tuple(dict.fromkeys((*DEFAULT_SEPARATORS, *CJK, *ARABIC, *DEVANAGARI, *THAI)))

SEPARATOR_LISTS = {
    "default": DEFAULT_SEPARATORS,
    "cjk": CJK,
    "arabic": ARABIC,
    "devanagari": DEVANAGARI,
    "thai": THAI,
    "multilingual": MULTILINGUAL,
    "code": CODE,
    "markdown": MARKDOWN,
}
# Which list has the marks of a sample text.
LIST_OF_SAMPLE = {
    "English": "default",
    "Chinese": "cjk",
    "Japanese": "cjk",
    "Korean": "default",
    "Russian": "default",
    "Arabic": "arabic",
    "Hindi": "devanagari",
    "Thai": "thai",
    "code": "code",
    "JSON": "code",
}


# Marks that end a sentence, and the semicolon: what ``keep_after`` keeps goes no further. Beside
# the English ones those of CJK, Arabic, Urdu and Devanagari. A newline ends a line or a turn.
DEFAULT_SEGMENT_ENDS = (
    *(".", "?", "!", ";", "\n"),
    *("。", "？", "！", "；", "\u061b", "\u061f", "\u06d4", "\u0964", "\u0965"),
)


def separator_texts(separators: Iterable[str]) -> tuple[str, ...]:
    """The texts that names and texts stand for, each once, in the order given."""
    texts = (SEPARATOR_LISTS.get(item, (item,)) for item in separators)
    return tuple(dict.fromkeys(text for group in texts for text in group))
