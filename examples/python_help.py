"""What the examples train on: Python's language reference, the pages that `help()` shows. Put your own data here."""

from __future__ import annotations

from itertools import chain
from typing import Any

from torch.utils.data import Dataset

Row = dict[str, list[int]]


def pages() -> list[tuple[str, str]]:
    """(title, text) of every page."""
    from pydoc_data.topics import topics

    parts = (topics[key].strip().split("\n", 2) for key in sorted(topics))
    return [(title, text.strip()) for title, _underline, text in parts]


class PackedText(Dataset[Row]):
    """Rows of `length` tokens for next-token training: the pages one after another, each with an end-of-text token."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        ids = tokenizer([f"{title}\n\n{text}" for title, text in pages()])["input_ids"]
        self.tokens = list(chain.from_iterable([*page, tokenizer.eos_token_id] for page in ids))
        self.length = length

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> Row:
        row = self.tokens[index * self.length : (index + 1) * self.length]
        return {"input_ids": row, "labels": row}


def questions_and_answers(tokenizer: Any, length: int) -> list[Row]:
    """A row for each page, of at most `length` tokens: a question with its answer, of which only the answer counts."""
    rows = []
    for title, text in pages():
        question = tokenizer(f"Question: what are {title.lower()} in Python?\nAnswer: ")["input_ids"]
        answer = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids = (question + answer)[:length]
        rows.append({"input_ids": ids, "labels": ([-100] * len(question) + answer)[:length]})
    return rows


def preferences() -> list[dict[str, str]]:
    """For each page a prompt, how it goes on, and the same in capitals, which nobody wants to read."""
    return [{"prompt": f"{title}\n\n", "chosen": text[:400], "rejected": text[:400].upper()} for title, text in pages()]
