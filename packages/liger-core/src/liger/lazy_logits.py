"""Logits that are computed when somebody first reads them.

After a loss that never held the logits, `outputs.logits` is one of these: a `torch.Tensor` with the right shape, dtype
and device. Any operation on it computes the real logits, once, as the model would have: they carry gradients where the
forward did. What trainers and wrappers do to every output unasked (`.float()`, `.detach()`, `.to(device)`, …) stays
lazy.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_Function = TypeVar("_Function", bound=Callable[..., Any])

_PROPERTIES = (
    *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad", "grad_fn", "is_leaf"),
    *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_nested", "is_quantized", "is_sparse", "is_xpu"),
)
_METHODS = (
    *("__hash__", "__len__", "dim", "element_size", "get_device", "is_complex", "is_contiguous", "is_floating_point"),
    *("is_inference", "ndimension", "nelement", "numel", "size", "stride"),
)
_METADATA = {getattr(Tensor, name).__get__ for name in _PROPERTIES} | {getattr(Tensor, name) for name in _METHODS}
_METADATA |= {torch.is_complex, torch.is_floating_point, torch.is_inference, torch.numel}
_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_GRAD_FN = Tensor.grad_fn.__get__  # type: ignore[union-attr]

_CONVERSIONS: dict[Any, torch.dtype | None] = {
    Tensor.double: torch.float64,
    Tensor.float: torch.float32,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
    Tensor.detach: None,
    Tensor.clone: None,
    Tensor.to: None,
}


def _uncompiled(function: _Function) -> _Function:
    reason = "outputs.logits are lazy: give compiled code outputs.logits + 0"
    disabled: _Function = torch.compiler.disable(function, reason=reason)
    return disabled


class _Values:
    """The values of some `LazyLogits` without their graph, for what is detached from them and may outlive them."""

    def __init__(self, logits: LazyLogits, compute: Callable[[], Tensor]) -> None:
        self._logits = weakref.ref(logits)
        self._compute: Callable[[], Tensor] | None = compute
        self._value: Tensor | None = None
        self._version = 0

    def set(self, value: Tensor) -> None:
        """The values are there; `value` may have a graph."""
        self._value, self._version, self._compute = value.detach(), version(value), None

    def read(self) -> Tensor:
        """The values, which the logits themselves compute as long as they are alive, so that it happens once."""
        logits = self._logits()
        if logits is not None:
            logits.materialize()
        elif self._compute is not None:
            self.set(self._compute())
        assert self._value is not None
        if version(self._value) != self._version:
            raise RuntimeError("liger: outputs.logits were changed in place before a conversion of them was first read")
        return self._value


class LazyLogits(Tensor):
    """A tensor of a given shape, dtype and device whose values `compute` returns at the first use.

    Until then Python is told that it requires no gradient, so that nobody hooks into a graph that is not there. An
    autograd Function that takes it as it is does not see through to that graph: its backward raises. So does that of
    what is computed from what such a Function has handed on. Only a second one, that detaches or clones what the first
    was told to require no gradient, looks like whoever wants values alone.
    """

    _compute: Callable[[], Tensor] | None
    _value: Tensor | None
    _plain: _Values
    _with_grad: bool
    _is_cut_off = False  # handed on by a Function that was told that it requires no gradient

    @staticmethod
    @_uncompiled
    def __new__(
        cls: type[LazyLogits],
        compute: Callable[[], Tensor],
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
        detached: Callable[[], Tensor] | None = None,
    ) -> LazyLogits:
        """Make one; `compute` must return a tensor of that shape, dtype and device.

        It has a graph where there is a `detached`, which returns the same without one, and must not hold it.
        """
        requires_grad = detached is not None
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=requires_grad)
        self._compute, self._value, self._with_grad = compute, None, requires_grad
        self._plain = _Values(self, detached or compute)
        if requires_grad:
            with torch._C.DisableTorchFunctionSubclass():
                self.register_hook(_refuse)
        return self

    def __init__(self, *_: Any) -> None:
        pass

    def materialize(self) -> Tensor:
        """The logits, computed now if they were not yet.

        Their backward raises where an autograd Function has detached them unread (DeepSpeed does that to every output),
        so that gradients would not reach the model.
        """
        if self._value is None:
            assert self._compute is not None
            with torch.inference_mode(False), _without_saved_tensors_hooks():
                value = self._compute()
                if self._is_lost():
                    with torch.enable_grad():
                        value = _Lost.apply(value.detach().requires_grad_())
            self._value = value
            self._plain.set(value)
            self._compute = None  # it holds the hidden states and their graph
        return self._value

    def _has_graph(self) -> bool:
        """Whether there is one behind it, or would be."""
        return self._with_grad or self._is_lost()

    def _is_lost(self) -> bool:
        """Whether there would be a graph, had nobody cut it off."""
        with torch._C.DisableTorchFunctionSubclass():
            return self._is_cut_off or (self.requires_grad and not self._with_grad)

    def _cut_off(self) -> LazyLogits:
        """The same for who takes it for what requires no gradient."""
        with torch._C.DisableTorchFunctionSubclass():
            handed_on = LazyLogits(self._plain.read, self.shape, self.dtype, self.device)
        handed_on._is_cut_off = True
        return handed_on

    def __repr__(self) -> str:  # type: ignore[override]
        if self._value is None:
            with torch._C.DisableTorchFunctionSubclass():
                return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"
        return repr(self._value)

    def _converted(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LazyLogits:
        """What `func(self, *args, **kwargs)`, one of the conversions, will be when it is read."""
        values = self._plain

        def compute() -> Tensor:
            value = self.materialize()
            values.read()
            with torch.enable_grad():
                return func(value, *args, **kwargs)

        def detached() -> Tensor:
            with torch.no_grad():
                return func(values.read(), *args, **kwargs)

        with torch._C.DisableTorchFunctionSubclass():
            shape, device, dtype = self.shape, self.device, _CONVERSIONS[func] or self.dtype
        if func is Tensor.to:
            to_device, to_dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
            device, dtype = to_device or device, to_dtype or dtype
        if self._has_graph() and torch.is_grad_enabled() and func is not Tensor.detach:
            return LazyLogits(compute, shape, dtype, device, detached)
        return LazyLogits(detached, shape, dtype, device)

    @classmethod
    @_uncompiled
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.retain_grad:
            raise RuntimeError(
                "liger: outputs.logits.retain_grad(): outputs.loss is computed without these logits, so that no "
                "gradient of it reaches them; for a loss of your own keep that of outputs.logits + 0, or use "
                "liger.apply(model, loss='full')"
            )
        if func is Tensor.register_hook:
            warnings.warn(
                "liger: outputs.loss is computed without outputs.logits: a hook on them sees the gradients of what "
                "else is computed from them",
                stacklevel=2,
            )
        if args and isinstance(args[0], LazyLogits) and args[0]._value is None:
            if func == _REQUIRES_GRAD:
                return False
            if func == _GRAD_FN:
                return None
            is_handed_on = func is Tensor.view_as and args[1] is args[0] and not torch.is_grad_enabled()
            if is_handed_on and args[0]._has_graph():
                return args[0]._cut_off()  # what autograd makes of an input that a Function hands on
            if func in _METADATA:
                return super().__torch_function__(func, types, args, kwargs)
            if func in _CONVERSIONS and _is_plain(args[1:], kwargs):
                return args[0]._converted(func, args[1:], kwargs)
        args, kwargs = _materialized((args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.detach.default and args[0]._value is None and args[0]._has_graph():
            return args[0]._cut_off()  # Python's detach does not come here: a Function hands on what it was given
        args, kwargs = _materialized((args, kwargs or {}))
        return func(*args, **kwargs)


class _Lost(torch.autograd.Function):
    """The values of logits that an autograd Function has cut off from the model."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> None:
        if gradient is None:  # as in `_refuse`
            return
        raise RuntimeError(
            "liger: outputs.logits went through an autograd Function before they were read (DeepSpeed's ZeRO, a full "
            "backward hook?): gradients would not reach the model; read outputs.logits.detach(), or use "
            "liger.apply(model, loss='full')"
        )


def _materialized(tree: Any) -> Any:
    return tree_map_only(LazyLogits, LazyLogits.materialize, tree)


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a conversion was told nothing but a device, a dtype and whether to wait."""
    kinds = (torch.device, torch.dtype, str, int)
    return kwargs.keys() <= {"device", "dtype", "non_blocking"} and all(isinstance(arg, kinds) for arg in args)


@contextmanager
def _without_saved_tensors_hooks() -> Iterator[None]:
    """Leave out the hooks of whoever reads the logits: what a checkpoint is given it does not compute again."""
    autograd: Any = torch._C._autograd
    hooks = []
    while (top := autograd._top_saved_tensors_default_hooks(True)) is not None:
        hooks.append(top)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(hooks):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def version(value: Tensor) -> int:
    """How often a tensor was changed in place; 0 of an inference tensor, which does not count."""
    return 0 if value.is_inference() else value._version


def _refuse(gradient: Tensor | None) -> None:
    if gradient is None:  # DDP passes every output through a Function of its own, and uses no gradient of this one
        return
    raise RuntimeError(
        "liger: outputs.logits went into an autograd Function or a C++ operator as they are, which sees no gradient "
        "path to the model behind them: give it outputs.logits + 0"
    )
