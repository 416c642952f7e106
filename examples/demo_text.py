"""The demo's text, which every Python has, and a tokenizer made from it."""

from __future__ import annotations

import os
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

_PIECE = re.compile(r" ?\w+| ?[^\w\s]+|\s+")


def text() -> str:
    """The language reference that `help()` shows, then the sources of the standard library, by name."""
    from pydoc_data.topics import topics

    sources = sorted(Path(os.__file__).parent.glob("*.py"))
    return "\n".join(chain((topics[key] for key in sorted(topics)), (p.read_text("utf-8", "replace") for p in sources)))


class Tokenizer:
    """The 256 bytes, then the commonest words of a text; a word that is not among them is spelled in bytes.

    Where the text has fewer words than the vocabulary has room, the last ids never occur. The loss costs the same.
    """

    def __init__(self, source: str, vocabulary: int) -> None:
        counted = Counter(_PIECE.findall(source))
        words = sorted(counted, key=lambda word: (-counted[word], word))[: vocabulary - 256]
        self._ids = {word: 256 + i for i, word in enumerate(words)}
        self._words = words

    def encode(self, source: str) -> Tensor:
        """The tokens of `source`, int64."""
        ids = self._ids
        pieces = ([ids[word]] if word in ids else list(word.encode()) for word in _PIECE.findall(source))
        return torch.tensor(list(chain.from_iterable(pieces)))

    def decode(self, tokens: Tensor) -> str:
        """The text of `tokens`."""
        pieces = (bytes([t]) if t < 256 else self._words[t - 256].encode() for t in tokens.tolist())
        return b"".join(pieces).decode("utf-8", "replace")


def batches(tokens: Tensor, count: int, batch: int, sequence: int, device: torch.device) -> list[Tensor]:
    """`count` batches of `batch` stretches of `sequence` tokens, from places drawn with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - sequence, (count, batch), generator=generator)
    return [torch.stack([tokens[s : s + sequence] for s in row.tolist()]).to(device) for row in starts]
