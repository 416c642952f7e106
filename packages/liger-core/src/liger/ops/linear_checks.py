"""What every op with a linear layer refuses of it, before it computes anything."""

from __future__ import annotations

import torch
from torch import Tensor

from liger.autocast import autocast_dtype

_NAMES = ("input", "linear_weight", "linear_bias")


def check_layer(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str] = _NAMES
) -> None:
    """Refuse a layer whose shapes or devices do not fit, or whose weight holds no data of its own.

    `names`: what the caller of `op` calls input, weight and bias.
    """
    input_name, weight_name, bias_name = names
    if not input.dim():
        raise ValueError(f"{op}: {input_name} has no dimension, expected (..., H)")
    if hasattr(weight, "device_mesh"):
        raise ValueError(f"{op}: {weight_name} is a DTensor: pass the whole weight, as its module's forward sees it")
    if weight.numel() == 0:
        raise ValueError(f"{op}: {weight_name} is empty, shape {tuple(weight.shape)}: has ZeRO-3 partitioned it?")
    if weight.dim() != 2 or weight.shape[1] != input.shape[-1]:
        expected = f"(V, {input.shape[-1]})"
        raise ValueError(f"{op}: {weight_name} has shape {tuple(weight.shape)}, expected {expected}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{op}: {bias_name} has shape {tuple(bias.shape)}, expected {tuple(weight.shape[:1])}")
    for name, tensor in ((weight_name, weight), (bias_name, bias)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {input_name}'s device {input.device}")


def check_dtypes(
    op: str, input: Tensor, weight: Tensor, bias: Tensor | None, names: tuple[str, str, str] = _NAMES
) -> torch.dtype:
    """The dtype that `F.linear` would compute in: autocast's, where it is on, else the one that all of them have."""
    autocast = autocast_dtype(input.device)

    def cast(dtype: torch.dtype) -> torch.dtype:
        return dtype if autocast is None or dtype == torch.float64 else autocast

    for name, tensor in zip(names, (input, weight, bias), strict=True):
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must have a floating-point dtype, not {tensor.dtype}")
        if cast(tensor.dtype) != cast(input.dtype):
            raise TypeError(f"{op}: {names[0]} is {input.dtype} and {name} is {tensor.dtype}: they must agree")
    return cast(input.dtype)


def check_accum_dtype(op: str, own: torch.dtype, accum_dtype: torch.dtype | None) -> torch.dtype:
    """The dtype that dW is summed in: `own`, unless `accum_dtype` names a wider one."""
    wide = torch.promote_types(own, torch.float32)
    if accum_dtype not in (None, own, wide):
        expected = f"None or {own}" if own == wide else f"None, {own} or {wide}"
        raise ValueError(f"{op}: accum_dtype must be {expected}, not {accum_dtype}")
    return accum_dtype or own
