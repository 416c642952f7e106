"""What of a model an adapter says nothing about, although it has the look of something that kernels are for."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from types import FunctionType
from typing import Any

from torch import nn

from liger.adapter import Adapter, Kind

_NORMS = (nn.LayerNorm, nn.RMSNorm)


def looks_like(module: nn.Module) -> Kind | None:
    """Which kind of kernel a module has the look of: by its class's name, its children, its methods."""
    children = {name for name, _ in module.named_children()}
    if "Norm" in type(module).__name__ and not children:
        return "norm"
    if {"gate_proj", "up_proj"} <= children or "gate_up_proj" in children:
        return "mlp"
    return "experts" if hasattr(module, "_apply_gate") else None


def rotary_functions(modeling: Any, modules: Iterable[nn.Module]) -> set[str]:
    """The functions of `modeling` with "rotary" in their name that a forward of `modules` calls."""
    forwards = [inspect.unwrap(type(module).forward) for module in modules]
    called = {name for forward in forwards if isinstance(forward, FunctionType) for name in forward.__code__.co_names}
    return {name for name in called if "rotary" in name and isinstance(getattr(modeling, name, None), FunctionType)}


def language_parts(model: Any) -> list[nn.Module]:
    """The model's decoder, and its encoder where that takes text too; its towers for images and sound are left out."""
    if not model.config.is_encoder_decoder:
        return [model.get_decoder()]
    encoder = model.get_encoder()  # one that takes images too, as T5Gemma 2's, holds its own text model
    return [model.get_decoder(), getattr(encoder, "text_model", encoder)]


def unnamed(adapter: Adapter, model: nn.Module) -> Iterator[str]:
    """A sentence for each class, function and head of an unpatched `model` that `adapter` should name and does not."""
    modules = [module for part in language_parts(model) for module in part.modules()]
    for cls, kind in {type(module): looks_like(module) for module in modules}.items():
        named = {base.__name__ for base in cls.__mro__} & set(adapter.modules)
        if kind and cls.__module__ == adapter.modeling and not named:
            what = f"modules lacks {cls.__name__}, which has the look of {kind}"
            yield f"{what}: name the Layer that computes what it does, or Stock({kind!r}, reason)"
    ours = [module for module in modules if type(module).__module__ == adapter.modeling]
    norms = {type(child).__name__ for module in ours for child in module.children() if type(child) in _NORMS}
    for name in sorted({f"nn.{norm}" for norm in norms} - set(adapter.modules)):
        yield f"modules lacks {name}, which classes of the file hold: name its Layer, or Stock('norm', reason)"
    for name in sorted(rotary_functions(adapter.module(), modules) - set(adapter.functions)):
        yield f"functions lacks {name}, which a forward calls: name the op that computes what it does, or the reason"
    if type(model).__name__ not in {head.model for head in adapter.heads}:
        yield f"head lacks {type(model).__name__}: without it the loss is transformers' own, on the whole logits"
