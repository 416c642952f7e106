"""The same step on a patched model, on the stock one and in fp64; the same call on one module of each."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from liger.testing.error_rule import assert_as_exact_as

MODEL_DEPTH = 40
"""How many ops deep a whole model's result lies, for the error rule's floor."""

Call = tuple[tuple[Any, ...], dict[str, Any]]


def cast(tree: Any, dtype: torch.dtype) -> Any:
    """`tree` with its floating-point tensors, detached, in another dtype."""

    def to(leaf: Any) -> Any:
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


def assert_same_step(patched: Any, stock: Any, exact: Any, inputs: dict[str, Any]) -> None:
    """Loss and every gradient of one step obey the error rule."""
    losses: list[Tensor] = []
    for model in (patched, stock, exact):
        model.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    dtype = next(stock.parameters()).dtype
    assert_as_exact_as(losses[0], losses[1], losses[2], "loss", depth=MODEL_DEPTH, computed_in=dtype)
    parameters = zip(patched.named_parameters(), stock.parameters(), exact.parameters(), strict=True)
    for (name, ours), theirs, reference in parameters:
        if theirs.grad is None:
            assert ours.grad is None, f"{name} has a gradient that the stock model does not give it"
            continue
        assert_as_exact_as(ours.grad, theirs.grad, reference.grad, f"gradient of {name}", depth=MODEL_DEPTH)
