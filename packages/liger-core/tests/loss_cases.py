"""What the tests of the losses have in common."""

from __future__ import annotations

import torch
import torch.nn.functional as F

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "z_loss": {"z_loss": 1e-2},
    "softcap": {"softcap": 3.0},
    "scale": {"logit_scale": 0.3},
    "all": {"label_smoothing": 0.2, "z_loss": 1e-2, "softcap": 2.0, "logit_scale": 1.5},
}
"""Of a cross entropy."""


def upstream_of(reduction, rows, device):
    """One gradient per row, or a power of two, as a GradScaler's: in fp16, backward must not round again for it."""
    return torch.rand(rows, device=device) if reduction == "none" else torch.tensor(0.25, device=device)


def cross_entropy_in_torch(
    logits, target, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None, logit_scale=1.0,
    reduction="mean", denominator=None,
):  # fmt: skip
    """What a model would write with torch's own functions: logits.float(), then everything in that."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    flat = (z.flatten(0, -2), target.flatten().long())
    loss = F.cross_entropy(*flat, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none")
    loss = loss.view(target.shape) + z_loss * z.logsumexp(-1).square() * (target != ignore_index)
    if reduction == "none":
        return loss
    count = (target != ignore_index).sum() if reduction == "mean" else 1
    return loss.sum() / float(count if denominator is None else denominator)
