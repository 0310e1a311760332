# .venv/bin/python examples/show_kept_tokens.py
"""The start of a book as its last token sees it: what SepLLM has dropped is dimmed.

`vllm-sepllm inspect` does this for any text and model, and as a web page.
"""

from pathlib import Path

from rich.console import Console
from rich.text import Text
from transformers import AutoTokenizer

from vllm_sepllm.config import SepLLMConfig
from vllm_sepllm.policy import KeepRule
from vllm_sepllm.separators import resolve_separators

HERE = Path(__file__).resolve().parent

tokenizer = AutoTokenizer.from_pretrained(HERE / "models" / "pg19-5m-sep")
config = SepLLMConfig(window_size=32)
config = config.with_kept_ids(resolve_separators(config, tokenizer).token_ids)
policy = KeepRule.of(config, len(tokenizer))

book = (HERE / "data" / "860.txt").read_text(encoding="utf-8").strip()
token_ids = tokenizer.encode(book[:1500], add_special_tokens=False)
visible = policy.kept_flags(token_ids)
visible[policy.window_start(len(token_ids) - 1) :] = True

text = Text()
for token_id, seen in zip(token_ids, visible, strict=True):
    text.append(tokenizer.decode([token_id]), "bold yellow" if seen else "dim")
Console().print(text)
print(f"{visible.sum()} of {visible.size} tokens are attended to ({visible.mean():.0%})")
