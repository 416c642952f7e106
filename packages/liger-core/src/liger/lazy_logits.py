"""Logits that are computed when somebody first reads them.

After a loss that never held the logits, `outputs.logits` is one of these: a `torch.Tensor` with the right shape, dtype
and device. Any operation on it computes the real logits, once, as the model would have: they carry gradients where the
forward did. Conversions that every trainer applies unasked (`.float()`, `.detach()`, …) stay lazy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_PROPERTIES = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "requires_grad", "is_sparse", "is_quantized")
_METHODS = ("size", "dim", "numel", "is_floating_point", "is_complex", "element_size")
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
_CONVERSIONS: dict[Any, torch.dtype | None] = {
    Tensor.float: torch.float32,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.detach: None,
    Tensor.contiguous: None,
}


class LazyLogits(Tensor):
    """A tensor of a given shape, dtype and device whose values `compute` returns at the first use."""

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None

    @staticmethod
    def __new__(
        cls: type[LazyLogits],
        compute: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> LazyLogits:
        """Make one; `compute` must return a tensor of that shape, dtype and device."""
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._compute, self._value = compute, None
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def materialize(self) -> Tensor:
        """The logits, computed now if they were not yet."""
        if self._value is None:
            assert self._compute is not None
            self._value = self._compute()
            self._compute = None  # it holds the hidden states and their graph
        return self._value

    def __repr__(self) -> str:  # type: ignore[override]
        if self._value is None:
            with torch._C.DisableTorchFunctionSubclass():
                return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"
        return repr(self._value)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _METADATA:
            return super().__torch_function__(func, types, args, kwargs)
        if func in _CONVERSIONS and isinstance(args[0], LazyLogits) and len(args) == 1 and not kwargs:
            lazy = args[0]
            with torch._C.DisableTorchFunctionSubclass():
                dtype = _CONVERSIONS[func] or lazy.dtype
                return LazyLogits(lambda: func(lazy.materialize()), lazy.shape, dtype, lazy.device)
        args, kwargs = _materialized((args, kwargs or {}))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = _materialized((args, kwargs or {}))
        return func(*args, **kwargs)


def _materialized(tree: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.materialize, tree)
