"""What one cheap pass rebuilds is not kept between forward and backward: `liger.apply(model, recompute=True)`.

A Linear keeps its input for its weight's gradient. Two kinds of inputs are a waste: a norm's output, which q, k and v
(gate and up) keep, and the product of a gated MLP, which `down_proj` keeps. What they were computed from is kept as
well, by the norm's and the activation's own backward. Bytes per token of one LLaMA layer in bf16, hidden size H,
intermediate size I, K for keys or values, with flash attention; in brackets H=2048, I=8192, K=512:

    kept by                      with the option off          on
    both norms: their input      4 H                [ 8192]   the same
    q, k, v: norm's output       2 H                [ 4096]   0
    attention: q, k, v, out      4 H + 4 K          [10240]   the same
    gate, up: norm's output      2 H                [ 4096]   0
    the activation: gate, up     4 I                [32768]   the same
    down_proj: the product       2 I                [16384]   0
    together                     12 H + 4 K + 6 I   [75776]   8 H + 4 K + 4 I   [51200]

One third less; at 16 layers and 4 × 4096 tokens 6.0 GiB less. The price in backward: each norm's forward and the
activation's forward once more, 8 H + 6 I bytes moved per token and layer, and a few microseconds of host time for
each tensor that the layers keep. Under autocast every projection keeps a cast copy of an fp32 norm's output: those are
rebuilt too.

How: while the forward of the swapped backbone runs (a "region"), `torch.autograd.graph.saved_tensors_hooks` shows each
tensor that autograd wants to keep. `rebuildable` has told the region which tensors are outputs of an op, and of which
inputs. An output, a view of one, or a cast of one is replaced by its recipe; whatever calls the Linear (LoRA, FSDP, a
quantised one) notices nothing, and no weight of a Linear is looked at. Everything else is kept as autograd keeps it.

What holds:

- A recipe keeps nothing alive: it is made only if autograd kept the very inputs of the op, and shares them. Parameters
  of norms are copied (N elements), because FSDP and ZeRO may have taken them apart again by the time of the rebuild.
- An output that was changed in place since is kept itself. An input that was changed is an error in backward, as it is
  without the option. What nobody counts is not seen: an output that is written to through `.data`, numpy or a kernel of
  one's own is computed again as it was before.
- q, k and v share one rebuilt tensor, from the first one's backward to the last one's.
- Where other hooks are at work around the model (`save_on_cpu`, non-reentrant checkpointing), torch would let ours hide
  them: no region is opened there. A layer that is checkpointed inside a region saves through the checkpoint's own
  hooks. In compiled code there is no region: the compiler decides by itself what it computes again.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from liger.autocast import autocast_dtype, under_autocast

__all__ = ["forward_in_region", "rebuildable"]

_PLAIN = (Tensor, nn.Parameter)


class _State(threading.local):
    region: _Region | None = None


_state = _State()


def rebuildable(op: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    """`op(*args, **options)`, noted in the open region, if any, as something that can be computed again.

    The op must be deterministic, and return a new tensor.
    """
    if torch.compiler.is_compiling() or _state.region is None:
        return op(*args, **options)
    return _state.region.run(op, args, options)


def forward_in_region(stock: Callable[..., Any]) -> Callable[..., Any]:
    """`stock`, the forward of a module, during which autograd keeps recipes of what is rebuildable."""

    @functools.wraps(stock)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or not _may_open():
            return stock(self, *args, **kwargs)
        region, outer = _Region(), _state.region
        with torch.autograd.graph.saved_tensors_hooks(region.pack, _unpack):
            _state.region = region
            try:
                return stock(self, *args, **kwargs)
            finally:
                _state.region = outer
                region.outputs.clear()

    return forward


def _may_open() -> bool:
    """Whether autograd keeps anything, and nobody else's hooks (or an open region, which serves as well) see it."""
    autograd: Any = torch._C._autograd
    return (
        torch.is_grad_enabled()
        and autograd._saved_tensors_hooks_is_enabled()
        and autograd._top_saved_tensors_default_hooks(True) is None
    )


class _Kept(NamedTuple):
    """A tensor that is kept itself. With hooks, autograd leaves watching its version to them."""

    tensor: Tensor
    version: int


class _View(NamedTuple):
    """What is kept in place of a recipe's tensor, of a view of it, or of a cast of either."""

    recipe: _Recipe
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt


_Packed = _Kept | _View


class _Recipe:
    """How one output is computed again. The result is held from the first of its consumers' backward to the last's."""

    def __init__(
        self, op: Callable[..., Tensor], args: list[Any], options: dict[str, Any], device: torch.device
    ) -> None:
        self.op, self.args, self.options, self.device = op, args, options, device
        self.autocast = autocast_dtype(device)
        self.consumers = 0
        self.left = 0
        self.rebuilt: tuple[Tensor, int] | None = None

    def result(self) -> Tensor:
        """The output again, in the values that it had."""
        stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
        held = self.rebuilt
        if held is None or held[1] != stream:
            held, self.left = (self._compute(), stream), self.consumers
        self.left -= 1
        self.rebuilt = held if self.left > 0 else None
        return held[0]

    def _compute(self) -> Tensor:
        args = [_unpack(arg) if isinstance(arg, _Kept | _View) else arg for arg in self.args]
        with torch.no_grad(), under_autocast(self.device, self.autocast):
            return self.op(*args, **self.options)


def _unpack(packed: _Packed) -> Tensor:
    if isinstance(packed, _View):
        result = packed.recipe.result()
        if result.dtype != packed.dtype:
            result = result.to(packed.dtype)
        return result.as_strided(packed.size, packed.stride, packed.offset)
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"[{tensor.dtype} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} instead"
        )
    return tensor


class _Output(NamedTuple):
    """An output that is alive, and how it is computed again."""

    tensor: weakref.ref[Tensor]
    version: int
    address: int
    recipe: _Recipe


class _Region:
    """One forward of a backbone: which tensors have a recipe, and what autograd keeps in their place."""

    def __init__(self) -> None:
        self.outputs: dict[int, _Output] = {}  # by id, which is another tensor's only once the entry is gone
        self.kept_by_op: dict[int, _Packed] | None = None

    def run(self, op: Callable[..., Tensor], args: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
        """The op's output, which has a recipe from now on if autograd keeps what it is computed from."""
        kept: dict[int, _Packed] = {}
        self.kept_by_op = kept
        try:
            output = op(*args, **options)
        finally:
            self.kept_by_op = None
        inputs = [arg for arg in args if isinstance(arg, Tensor)]
        kept_anyway = kept and all(type(arg) in _PLAIN and (id(arg) in kept or _is_weight(arg)) for arg in inputs)
        if kept_anyway and type(output) is Tensor and output._base is None:
            self._add(output, _Recipe(op, [_input(arg, kept) for arg in args], options, output.device))
        return output

    def _add(self, output: Tensor, recipe: _Recipe) -> None:
        outputs, key = self.outputs, id(output)
        outputs[key] = _Output(
            weakref.ref(output, lambda _: outputs.pop(key, None)), output._version, output.data_ptr(), recipe
        )

    def pack(self, tensor: Tensor) -> _Packed:
        """What autograd keeps of a tensor that it wants to keep."""
        packed: _Packed | None = self._view(tensor) if self.outputs and type(tensor) is Tensor else None
        if packed is None:
            # A parameter is kept itself, as autograd does: ZeRO-3 exchanges its data. Of all others only the data: a
            # node that kept its own output would never be freed.
            packed = _Kept(tensor if tensor.is_leaf else tensor.detach(), tensor._version)
        if self.kept_by_op is not None:
            self.kept_by_op[id(tensor)] = packed
        return packed

    def _view(self, tensor: Tensor) -> _View | None:
        """The tensor as a view of an output or of a cast of one, if it is that and has the values it had then."""
        base = tensor if tensor._base is None else tensor._base
        output = self.outputs.get(id(base)) or self._cast_from(base)
        if output is None or tensor.dtype != base.dtype:
            return None
        alive = output.tensor()
        if alive is None or (alive._version, alive.data_ptr()) != (output.version, output.address):
            return None
        output.recipe.consumers += 1
        return _View(output.recipe, tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset())

    def _cast_from(self, base: Tensor) -> _Output | None:
        """The output that `base` is nothing but a cast of, as autograd's graph has it."""
        for output in list(self.outputs.values()):
            source = output.tensor()
            if source is None or source.dtype == base.dtype or source.shape != base.shape:
                continue
            node = base.grad_fn
            if node is None or node.name() != "ToCopyBackward0" or base._version != 0:
                return None
            same = source.device == base.device and source.stride() == base.stride()
            if same and node.next_functions[0][0] is source.grad_fn:
                return output
        return None


def _is_weight(arg: Tensor) -> bool:
    """Whether it is one number to a column: a parameter, in whatever shape FSDP hands it out."""
    return arg.dim() == 1


def _input(arg: Any, kept: dict[int, _Packed]) -> Any:
    """An op's argument as its recipe holds it."""
    if not isinstance(arg, Tensor):
        return arg
    if _is_weight(arg):
        return arg.detach().clone()
    packed = kept[id(arg)]
    if isinstance(packed, _View):
        packed.recipe.consumers += 1
    return packed
