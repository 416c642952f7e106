"""What the sweep measures on which GPU, the most telling first, and about how long each part takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.models import SHAPES, Shape

Size = tuple[int, int]

WARM_UP, FEWEST, MOST = 1, 2, 20
"""Steps that do not count at each size, and the fewest and the most that do."""
START, COMPILATION = 8.0, 20.0
"""Seconds until a process has a model and its first step, and for torch.compile at each size."""
LONGEST_STEP = 16.0
"""Seconds of a step beyond which no longer sequence is tried."""
LADDER = tuple(sorted(2**power * part // 4 for power in range(11, 18) for part in (3, 4)))
"""The sequence lengths tried: powers of two from 2048 to 131072, and ¾ of each."""


@dataclass(frozen=True)
class Group:
    """A model, trained in each of the ways at each size until memory runs out; or its longest sequence in each."""

    model: str
    checkpointing: bool
    sizes: tuple[Size, ...]
    """Batch × sequence, the smaller first."""
    ways: tuple[str, ...] = ("liger", "eager", "liger-kernel")
    longest: bool = False
    """Whether to look for the longest sequence, for which the sizes only give a first guess."""

    @property
    def shape(self) -> Shape:
        """The model's sizes."""
        return SHAPES[self.model]

    @property
    def name(self) -> str:
        """What it is called in the results, whose figures of one name belong together."""
        return f"{self.model}{', checkpointing' if self.checkpointing else ''}"

    @property
    def ladder(self) -> tuple[int, ...]:
        """The sequences whose step takes no longer than is tried."""
        return tuple(rung for rung in LADDER if step_seconds(self, (1, rung)) <= LONGEST_STEP)

    def seconds(self, way: str) -> float:
        """About how long a way takes if no size runs out of memory."""
        seconds = START + sum(size_seconds(self, size) for size in self.sizes)
        seconds += COMPILATION * len(self.sizes) if way == "compile" else 0
        return seconds + (1.5 * step_seconds(self, (1, self.ladder[-1])) if self.longest else 0)


def _sweep(model: str, *batches: int, checkpointing: bool = False, sequence: int = 4096) -> Group:
    return Group(model, checkpointing, tuple((batch, sequence) for batch in batches))


def _longest(model: str, checkpointing: bool = False, ways: tuple[str, ...] = ("liger", "eager")) -> Group:
    return Group(model, checkpointing, ((1, 2048), (1, 4096)), ways, longest=True)


def _recomputed(model: str, *batches: int) -> tuple[Group, Group]:
    """What `recompute=True` does to the sizes of a model, and to its longest sequence."""
    ways = ("liger, recompute",)
    return Group(model, False, tuple((batch, 4096) for batch in batches), ways), _longest(model, ways=ways)


_FEW_TOKENS = ((1, 256), (1, 512), (1, 1024), (1, 2048))
"""Sizes of which a step waits for the host."""

PLANS = {
    75: (
        _sweep("llama-1b", 1, 2, 4, 8),
        *_recomputed("llama-1b", 1, 2, 4, 8),
        _sweep("llama-1b", 4, 8, 16, checkpointing=True),
        _longest("llama-1b"),
        _sweep("qwen3-1.7b", 2, 4, 8, checkpointing=True),
        _sweep("gemma2-2b", 1, 2, checkpointing=True),
        _sweep("phi3-mini", 1, 4, checkpointing=True),
        _sweep("mistral-7b", 1, 2, 4, checkpointing=True),
        Group("llama-1b", False, ((4, 4096),), ways=("compile",)),
        _longest("mistral-7b", checkpointing=True),
        _longest("llama-1b", checkpointing=True),
        _longest("phi3-mini", checkpointing=True),
        _longest("qwen3-1.7b", checkpointing=True),
        _sweep("qwen3-1.7b", 1, 2, 4),
        _sweep("phi3-mini", 1, 2),
        _sweep("gemma2-2b", 1, 2, sequence=2048),
        Group("llama-1b", False, ((1, 4096),), ways=("compile",)),
        Group("llama-1b", False, _FEW_TOKENS),
    ),
    130: (
        _sweep("llama-8b", 1, 4, 8, checkpointing=True),
        _sweep("llama-1b", 4, 8, 16),
        *_recomputed("llama-1b", 4, 8, 16),
        _sweep("llama-8b", 1, checkpointing=True, sequence=16384),
        _sweep("qwen3-8b", 1, 4, checkpointing=True),
        _longest("llama-8b", checkpointing=True),
        _sweep("mistral-7b", 1, 4, 8, checkpointing=True),
        _longest("llama-1b"),
        _sweep("llama-8b", 1, 2, 4),
        Group("llama-1b", False, ((4, 4096),), ways=("compile",)),
        Group("llama-1b", False, _FEW_TOKENS),
        _sweep("phi3-mini", 1, 4),
        _sweep("gemma2-2b", 1, 2),
        _sweep("qwen3-1.7b", 1, 4, 8),
        _longest("qwen3-8b", checkpointing=True),
        _sweep("qwen3-8b", 1, 2),
        _sweep("mistral-7b", 1, 2),
    ),
}
"""By the GiB of memory that a GPU has at least."""

TINY = (
    Group("llama-1b", False, ((1, 16), (2, 16))),
    Group("llama-1b", False, ((1, 16),), ways=("compile",)),
    Group("qwen3-1.7b", True, ((1, 16),)),
    Group("llama-1b", False, ((1, 8), (1, 16)), ways=("liger",), longest=True),
)
"""For `--tiny`, whose models have other sizes too."""


def plan(gib: float) -> tuple[Group, ...]:
    """The groups for a GPU of that memory; those of the smallest one for less."""
    return PLANS[max((least for least in PLANS if least <= gib), default=min(PLANS))]


def step_seconds(group: Group, size: Size) -> float:
    """About how long a step takes on an H100: its operations, at the speeds that such steps were seen to have."""
    batch, sequence = size
    shape, sizes = group.shape, group.shape.config
    columns = sizes["num_attention_heads"] * shape.head_dim
    per_token = 6 * shape.parameters + 6 * sizes["num_hidden_layers"] * columns * sequence
    again = 4 / 3 if group.checkpointing else 1
    return batch * sequence * per_token * again / (380e12 if shape.attention == "sdpa" else 180e12)


def counted_steps(seconds: float) -> int:
    """How many steps count where one takes `seconds`: those of a second and a half."""
    return max(FEWEST, min(MOST, math.ceil(1.5 / seconds)))


def size_seconds(group: Group, size: Size) -> float:
    """About how long a size takes with all its steps."""
    seconds = step_seconds(group, size)
    return seconds * (WARM_UP + counted_steps(seconds))
