r"""`linear_cross_entropy` of a weight whose rows, the vocabulary, lie on several ranks: tensor parallelism.

Each rank computes its own columns of a chunk of logits, and of every row three numbers:

    m_r = max_j z_j        s_r = log Σ_j exp(z_j − m_r)        t_r = z_t, 0 where the label is another rank's

These are all that is exchanged, in one collective a chunk. On every rank alike:

    m = max_r m_r          s = log Σ_r exp(m_r − m + s_r)      loss = (m − Σ_r t_r) + s        (see `loss_rows`)

With them a rank's logits become its columns of the gradient. dW and db are those of its own rows of the weight. dx is a
sum over the ranks, which backward takes in the dtype of dx.

Shapes: x (M, H) and the labels are the same on all ranks; the weight is (V/ranks, H), as `torch.chunk` divides it. The
three numbers run in fp32 (fp64 inputs: in fp64).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from liger.ops.cross_entropy import check_arguments, check_labels, checked_options, divisor, reduced
from liger.ops.linear_checks import check_accum_dtype, check_dtypes, check_layer
from liger.ops.linear_chunks import (
    given,
    needed,
    through_chunks,
)
from liger.ops.loss_rows import Options, fill_rows
from liger.ops.named import named
from liger.ops.once_differentiable import once_differentiable
from liger.ops.upstream_scale import early_and_late, scaled

_IGNORED = -1  # in a rank's own numbering of the labels, whatever `ignore_index` is


def sharding_declines(weight: Any, bias: Any = None) -> str | None:
    """Why `vocab_parallel_linear_cross_entropy` does not take this DTensor, or None; the same on every rank."""
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if not hasattr(tensor, "device_mesh"):
            return f"its {name} is no DTensor"
        if tensor.device_mesh != weight.device_mesh or tensor.device_mesh.ndim != 1:
            return f"its {name} lies on {tensor.device_mesh}, not on one dimension that weight and bias share"
        if not (type(tensor.placements[0]).__name__ == "Shard" and tensor.placements[0].dim == 0):
            return f"its {name} is placed {tensor.placements[0]}, not Shard(0)"
    ranks, rows = weight.device_mesh.size(), weight.shape[0]
    if rows <= -(-rows // ranks) * (ranks - 1):
        return f"its {rows} rows are too few for {ranks} ranks"
    return None


def _exchanged(lse: Tensor, z_label: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """The three numbers of the whole rows, (M,) each, from those of every rank's part, (M, 2) and (M,)."""
    mine = torch.stack([*lse.unbind(-1), z_label])
    every = mine.new_empty(dist.get_world_size(group) * len(mine), *z_label.shape)
    dist.all_gather_into_tensor(every, mine, group=group)
    tops, aboves, z_labels = every.view(-1, *mine.shape).unbind(1)
    top = tops.amax(0)
    return top, (tops - top + aboves).logsumexp(0), z_labels.sum(0)


@named("vocab_parallel_linear_cross_entropy")
class _VocabParallel(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, denominator: Tensor | None,
        needs: tuple[bool, bool, bool], dtypes: tuple[torch.dtype, torch.dtype], options: Options,
        shard: tuple[dist.ProcessGroup, int, int],
    ) -> Tensor:  # fmt: skip
        group, classes, first = shard
        own = options._replace(ignore_index=_IGNORED)
        ignored = target == options.ignore_index
        valid = ignored | ((target >= 0) & (target < classes))
        here = (target >= first) & (target < first + weight.shape[0])
        label = torch.where(here, target - first, weight.shape[0]).masked_fill_(ignored, _IGNORED)
        early, _ = early_and_late(denominator, dtypes[0])
        wide = torch.promote_types(dtypes[0], torch.float32)
        loss, lse = input.new_empty(target.shape, dtype=wide), input.new_empty((*target.shape, 2), dtype=wide)

        def fill(logits: Tensor, rows: slice) -> None:
            fill_rows(logits, label[rows], own, loss[rows], lse[rows], part=True)
            top, above, z_label = _exchanged(lse[rows], loss[rows], group)
            top = torch.where(valid[rows], top, float("nan"))
            torch.stack([top, above], -1, out=lse[rows])
            value = top - z_label + above + options.z_loss * (top + above).square()
            loss[rows] = torch.where(ignored[rows], 0.0, value)
            if any(needs):
                fill_rows(logits, label[rows], own, None, lse[rows], logits, denominator=early, part=True)

        widest = -(-classes // dist.get_world_size(group))
        compute_dtype, accum_dtype = dtypes
        gradients = through_chunks(
            input, weight, bias, compute_dtype, accum_dtype, fill, needs, labels=label, planned_columns=widest
        )
        ctx.save_for_backward(input, weight, bias, label, denominator, lse, *gradients)
        ctx.needs, ctx.dtypes, ctx.options, ctx.group = needs, dtypes, own, group
        ctx.is_used = False
        return reduced(loss, "sum", denominator)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, label, denominator, lse, *gradients = ctx.saved_tensors
        dx, dw, db = gradients
        if ctx.is_used:

            def fill(logits: Tensor, rows: slice) -> None:
                fill_rows(
                    logits, label[rows], ctx.options, None, lse[rows], logits,
                    upstream=upstream, denominator=denominator, part=True,
                )  # fmt: skip

            compute_dtype, accum_dtype = ctx.dtypes
            dx, dw, db = through_chunks(input, weight, bias, compute_dtype, accum_dtype, fill, ctx.needs, labels=label)
        else:
            ctx.is_used = True
            _, late = early_and_late(denominator, ctx.dtypes[0])
            dx, dw, db = (scaled(gradient, upstream, late) for gradient in (dx, dw, db))
        if ctx.needs[0]:
            dist.all_reduce(dx, group=ctx.group)
        return *given((dx, dw, db), ctx.needs, weight, bias), *(None,) * 6


def vocab_parallel_linear_cross_entropy(
    input: Any,
    linear_weight: Any,
    target: Tensor,
    *,
    linear_bias: Any = None,
    reduction: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    accum_dtype: torch.dtype | None = None,
) -> Tensor:
    """`linear_cross_entropy` of a DTensor weight, sharded by rows, that never holds even a rank's share of the logits.

    Every rank of the weight's mesh must call it with the same input and labels, and run its backward: both are
    collective. Each gets the same loss, the gradient of its own part of the weight, and the whole gradient of input.
    `liger.apply` runs it for a model under tensor parallelism; call it in a training loop of one's own.

    There is no label_smoothing, which needs a fourth number of each row, and no reduction="none". For those take
    `linear_cross_entropy` of the whole weight, `linear_weight.full_tensor()`.

    Args:
        input: (..., H), the same on every rank: a plain tensor, or a replicated DTensor.
        linear_weight: (V, H), a DTensor on a one-dimensional mesh, placed `Shard(0)`.
        target: (...), int64 or int32, the same on every rank.
        linear_bias: (V,), a DTensor as the weight; None for none.
        reduction: "mean" or "sum".
        ignore_index, z_loss, softcap, logit_scale, denominator, accum_dtype: as in `linear_cross_entropy`.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs), as a plain tensor.

    Raises:
        IndexError: a label on the CPU is out of range; on a GPU its loss is NaN.
        ValueError: the weight is no such DTensor, reduction is "none", shapes or devices do not fit, or an option is
            wrong as in `linear_cross_entropy`.
        TypeError: as `linear_cross_entropy`.
    """
    op = "vocab_parallel_linear_cross_entropy"
    reason = sharding_declines(linear_weight, linear_bias)
    if reason is not None:
        raise ValueError(f"{op}: {reason}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"{op}: reduction must be 'mean' or 'sum', not {reduction!r}")
    mesh, classes = linear_weight.device_mesh, linear_weight.shape[0]
    if hasattr(input, "device_mesh"):
        if input.device_mesh != mesh or not input.placements[0].is_replicate():
            raise ValueError(f"{op}: input is placed {input.placements} on {input.device_mesh}, not replicated")
        input = input.to_local()
    weight = linear_weight.to_local()
    bias = None if linear_bias is None else linear_bias.to_local()
    options = checked_options(op, ignore_index, z_loss=z_loss, softcap=softcap, logit_scale=logit_scale)
    check_layer(op, input, weight, bias)
    check_arguments(op, target, input, options, reduction, denominator)
    check_labels(op, target, classes, ignore_index)
    compute_dtype = check_dtypes(op, input, weight, bias)
    own = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    dtypes = (compute_dtype, check_accum_dtype(op, own, accum_dtype))

    x, labels = input.reshape(-1, input.shape[-1]), target.reshape(-1)
    divide_by = divisor(denominator, reduction, labels, ignore_index, input)
    first = mesh.get_local_rank() * -(-classes // mesh.size())
    return _VocabParallel.apply(
        x, weight, bias, labels, divide_by, needed(x, weight, bias), dtypes, options, (mesh.get_group(), classes, first)
    )
