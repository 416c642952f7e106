"""What an error is measured against: the formulas in fp64, a stretch of rows at a time, so that it fits."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.cases import Case, Problem


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm, rounded nowhere."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and its RMSNorm, rounded nowhere."""
    return rms_norm(x + residual, weight), x + residual


def qk_norm_rotary(
    q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor]:
    """RMSNorm of every head, then its rotation."""
    return rotary(rms_norm(q, q_weight), rms_norm(k, k_weight), cos, sin)


def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary embedding of halves, as LLaMA has it."""

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    return turn(q), turn(k)


def linear_log_prob(input: Tensor, linear_weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Each target's log-probability, and the entropy."""
    log_p = (input @ linear_weight.T).log_softmax(-1)
    return log_p.gather(-1, target[:, None])[:, 0], -(log_p.detach().exp() * log_p.detach()).sum(-1)


def as_tuple(output: Any) -> tuple[Tensor, ...]:
    """What an op returned, as a tuple."""
    return output if isinstance(output, tuple) else (output,)


def differentiated(
    outputs: tuple[Tensor, ...], upstream: tuple[Tensor | None, ...]
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The outputs that have an upstream gradient, and those gradients."""
    pairs = [(output, given) for output, given in zip(outputs, upstream, strict=True) if given is not None]
    return tuple(output for output, _ in pairs), tuple(given for _, given in pairs)


class _Distance:
    """‖got − want‖ / ‖want‖, from its pieces."""

    def __init__(self) -> None:
        self.off: Tensor | float = 0.0
        self.size: Tensor | float = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        # A block at a time: an fp64 copy of a whole gradient of a large head is more than some memories hold.
        for g, w in zip(got.detach().split(4096), want.detach().split(4096), strict=True):
            self.off = self.off + (g.double() - w).pow(2).sum()
            self.size = self.size + w.pow(2).sum()

    def value(self) -> float:
        return float((self.off / self.size) ** 0.5)


def errors(
    case: Case, problem: Problem, outputs: tuple[Tensor, ...], gradients: tuple[Tensor, ...]
) -> dict[str, float]:
    """The relative error of each output and each gradient; a name like `d weight` is a gradient's."""
    total = next(iter(problem.rows.values())).shape[0]
    shared = {name: t.detach().double().requires_grad_(name in problem.wrt) for name, t in problem.shared.items()}
    got = dict(zip(problem.wrt, gradients, strict=True))
    distances: dict[str, _Distance] = defaultdict(_Distance)
    loss = 0.0

    for first in range(0, total, case.chunk):
        rows = slice(first, first + case.chunk)
        stretch = {
            name: t.detach()[rows].double().requires_grad_(name in problem.wrt) if t.is_floating_point() else t[rows]
            for name, t in problem.rows.items()
        }
        wanted = as_tuple(case.exact(**stretch, **shared))
        if problem.upstream is None:
            (summed,) = wanted
            mean = summed / total
            mean.backward()
            loss += float(mean.detach())
        else:
            roots = differentiated(wanted, tuple(None if up is None else up[rows].double() for up in problem.upstream))
            torch.autograd.backward(*roots)
            for i, want in enumerate(wanted):
                distances["output" if len(wanted) == 1 else f"output {i}"].add(outputs[i][rows], want)
        for name, leaf in stretch.items():
            if leaf.grad is not None:
                distances[f"d {name}"].add(got[name][rows], leaf.grad)

    if problem.upstream is None:
        distances["loss"].add(
            outputs[0].reshape(1), torch.tensor([loss], dtype=torch.float64, device=outputs[0].device)
        )
    for name, leaf in shared.items():
        if leaf.grad is not None:
            distances[f"d {name}"].add(got[name], leaf.grad)
    return {name: distance.value() for name, distance in distances.items()}
