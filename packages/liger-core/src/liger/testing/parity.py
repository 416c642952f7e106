"""The same step on a patched model, on the stock one and in fp64; the same call on one module of each."""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liger.testing.error_rule import assert_as_exact_as

MODEL_DEPTH = 40
"""How many ops deep a whole model's result lies, for the error rule's floor."""

_FEW = 32
"""What has fewer elements is judged as a part of the whole: the error of one number is a matter of luck."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """`tree` with its floating-point tensors, detached, in another dtype."""

    def to(leaf: Any) -> Any:
        if isinstance(leaf, UserDict):  # the keys and values that some models share between layers
            return type(leaf)(cast(dict(leaf), dtype))
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().to(dtype) if floating else leaf

    return torch.utils._pytree.tree_map(to, tree)


def in_fp64(model: Any) -> Any:
    """A copy of `model` in fp64. Its experts run their own loop: torch's grouped product takes no fp64."""
    exact = copy.deepcopy(model).double()
    if getattr(exact.config, "_experts_implementation", None):
        exact.set_experts_implementation("eager")
    return exact


def recorded_calls(model: Any, methods: Mapping[str, str], inputs: dict[str, Tensor]) -> dict[str, Call]:
    """What the given method of each named module is first called with in one forward."""
    calls: dict[str, Call] = {}

    def recording(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            calls.setdefault(name, (args, kwargs))
            return own(*args, **kwargs)

        return method

    for name, method in methods.items():
        module = model.get_submodule(name)
        setattr(module, method, recording(name, getattr(module, method)))
    try:
        model(**inputs, use_cache=False)
    finally:
        for name, method in methods.items():
            delattr(model.get_submodule(name), method)
    return calls


def numbers_of(owner: Any) -> list[str]:
    """The attributes of a module or a config that are floats: an epsilon, a multiplier, a dropout's probability."""
    return [name for name, value in vars(owner).items() if isinstance(value, float)]


def disturb_numbers(owner: Any, among: Collection[str] | None = None) -> None:
    """Set them, or those `among` names, to values, no two alike, that hide nothing, as 1 of a multiplier does."""
    for place, name in enumerate(numbers_of(owner)):
        if among is None or name in among:
            setattr(owner, name, 0.3 + place / 20)


def run(module: nn.Module, method: str, args: Any, kwargs: Any) -> list[Tensor | None]:
    """A call's output, and the gradients of its tensor inputs and parameters under a fixed upstream gradient."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    # Only the hidden states get gradients: cos, sin and masks have none in a model.
    args, hidden = (leaf(args[0]), *args[1:]) if args else args, kwargs.get("hidden_states")
    kwargs = {**kwargs, "hidden_states": leaf(hidden)} if hidden is not None else kwargs
    output = (module if method == "forward" else getattr(module, method))(*args, **kwargs)
    output = output[0] if isinstance(output, tuple) else output
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, [*leaves, *module.parameters()], upstream, allow_unused=True)]


def assert_same_step(patched: Any, stock: Any, exact: Any, inputs: dict[str, Any], together: bool = False) -> None:
    """Loss and every gradient of one step obey the error rule; those of fp32 models one by one, or `together`."""
    losses: list[Tensor] = []
    for model in (patched, stock, exact):
        model.zero_grad()
        losses.append(model(**(cast(inputs, torch.float64) if model is exact else inputs)).loss)
        losses[-1].backward()
    dtype = next(stock.parameters()).dtype
    assert_as_exact_as(losses[0], losses[1], losses[2], "loss", depth=MODEL_DEPTH, computed_in=dtype)
    parameters = zip(patched.named_parameters(), stock.parameters(), exact.parameters(), strict=True)
    gradients = {f"gradient of {n}": (ours.grad, theirs.grad, e.grad) for (n, ours), theirs, e in parameters}
    # Through a whole model in bf16 the error of any one parameter's gradient is a matter of luck, of all not.
    alone_from = _FEW if dtype == torch.float32 and not together else None
    assert_each_as_exact_as(gradients, depth=MODEL_DEPTH, alone_from=alone_from)


def assert_each_as_exact_as(
    triples: Mapping[str, tuple[Tensor | None, Tensor | None, Tensor | None]],
    *,
    depth: int = 1,
    alone_from: int | None = _FEW,
) -> None:
    """Each (ours, torch's own, exact) obeys the error rule, None standing for None.

    What has fewer elements than `alone_from` (None: all) is judged as a part of the whole.
    """
    there: list[tuple[Tensor, Tensor, Tensor]] = []
    for what, (ours, own, exact) in triples.items():
        if ours is None or own is None or exact is None:
            assert ours is own is None, f"{what}: there is one, and none in the other model"
            continue
        there.append((ours, own, exact))
        assert ours.dtype == own.dtype, f"{what}: dtype {ours.dtype}, expected {own.dtype}"
        if alone_from is not None and own.numel() >= alone_from:
            assert_as_exact_as(ours, own, exact, what, depth=depth)
    if there:
        ours, own, exact = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in zip(*there, strict=True))
        assert_as_exact_as(ours, own, exact, f"{', '.join(triples)} together", depth=depth)
