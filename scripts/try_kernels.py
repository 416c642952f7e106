"""Which kernels compute what the parts of a transformers model compute, found by trying them on a tiny one.

Every candidate of `liger.layers` that a module's attributes allow is run on the inputs that the model gives the module;
what agrees in fp32 and rounds alike in bf16 is taken. What nothing agrees with is named with the reason.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from types import ModuleType
from typing import Any, get_args

import torch
from torch import Tensor, nn

from liger.adapter import Adapter, Layer
from liger.causal_lm import CausalLM
from liger.layers import Experts, FusedGatedMLP, GatedMLP, LayerNorm, RMSNorm, Stock
from liger.ops import rotary, rotary_one
from liger.ops.rms_norm import Cast
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.parity import disturb_numbers, numbers_of, recorded_calls
from liger.testing.tiny import batch, build
from liger.testing.unnamed import language_parts, looks_like, rotary_functions
from rotary_in_own_dtype import rotary_in_own_dtype

CPU = torch.device("cpu")
SIZES = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2} | {
    "moe_intermediate_size": 40, "n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_shared_experts": 1
}  # fmt: skip
"""What a config of experts needs to be tiny, where it has the attribute."""

OTHER = "computes what no layer of liger.layers does"


class RefusalError(Exception):
    """Why nothing can be tried on a model."""


@dataclass
class Findings:
    """What was found out of one model: the adapter, and what its test's config must say."""

    adapter: Adapter
    model: str
    config: str
    options: dict[str, Any]
    declines: dict[str, str] = field(default_factory=dict)


def find(modeling: ModuleType, options: dict[str, Any]) -> Findings:
    """Try the kernels on the first `…ForCausalLM` of a modeling module.

    Args:
        modeling: the imported module.
        options: what its config must be given beside `liger.testing.TINY`.

    Raises:
        RefusalError: the module has no such class, or it does not run at these sizes.
    """
    names = [name for name in modeling.__all__ if name.endswith("ForCausalLM")]
    if not names:
        raise RefusalError(f"{modeling.__name__} has no class …ForCausalLM, only {', '.join(modeling.__all__)}")
    cls = getattr(modeling, names[0])
    known = vars(cls.config_class())
    drops = [name for name, value in known.items() if isinstance(value, float) and re.search("dropout|pdrop", name)]
    calm = {name: 0.0 for name in drops if known[name]}
    sizes = {name: size for name, size in SIZES.items() if name in known}
    options = {**sizes, **_loud(cls, known), **calm, **options}
    found = Findings(Adapter(modeling.__name__), names[0], cls.config_class.__name__, options)
    models = _models(cls, options)
    disturbed = _models(cls, options)  # by `_layer`
    layers = {name: _layer(cls, disturbed) for name, cls in _classes(modeling, models[0])}
    modules = {name: layer for name, layer in layers.items() if layer is not None}
    functions = {name: _rotary(modeling, name, models) for name in _rotary_names(modeling, models[0])}
    found.adapter = replace(found.adapter, modules=modules, functions=functions)
    found.adapter = replace(found.adapter, head=_head(found.adapter, models[0]))
    found.declines = {name: layer.reason for name, layer in modules.items() if isinstance(layer, Stock)}
    reasons = [op for op in functions.values() if isinstance(op, str)]
    found.declines |= {"rope": reasons[0]} if reasons else {}
    return found


def _models(cls: Any, options: dict[str, Any]) -> list[Any]:
    """A tiny model in fp32 and in bf16."""
    try:
        config = cls.config_class(**{**TINY, **options})
        models = [build(cls, config, CPU, dtype) for dtype in (torch.float32, torch.bfloat16)]
        models[0](**batch(TINY["vocab_size"], CPU))
    except Exception as error:  # of transformers: each model has its own demands on its sizes
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        message = f"a {cls.__name__} of liger.testing.TINY and {options} does not run: {reason}"
        raise RefusalError(f"{message}; --set gives its config what it needs (head_dim=12, say)") from error
    return models


def _loud(cls: type[nn.Module], known: dict[str, Any]) -> dict[str, Any]:
    """Values, no two alike, at which every number that the model's own class reads, and the epsilons, are seen."""
    read = set(re.findall(r"\.(\w+)", inspect.getsource(cls))) & known.keys()
    numbers = [name for name in sorted(read) if isinstance(known[name], float) or "softcap" in name]
    loud = {name: 3.0 + place / 2 for place, name in enumerate(numbers)}
    return loud | {name: 1e-3 for name in known if re.fullmatch(r"\w*norm\w*_eps(ilon)?", name)}


def _classes(modeling: ModuleType, model: Any) -> Iterator[tuple[str, type[nn.Module]]]:
    """Each class of the file, and each norm of torch's that its classes hold, by the name that an adapter gives it."""
    modules = {type(module) for part in language_parts(model) for module in part.modules()}
    for cls in sorted(modules, key=lambda cls: cls.__name__):
        if cls.__module__ == modeling.__name__:
            yield cls.__name__, cls
        elif cls in (nn.LayerNorm, nn.RMSNorm):
            yield f"nn.{cls.__name__}", cls


def _layer(cls: type[nn.Module], models: list[Any]) -> Layer | None:
    """The layer that computes what modules of `cls` do, Stock where none does, None where none is looked for."""
    name = next(name for name, module in models[0].named_modules() if type(module) is cls)
    kind = looks_like(models[0].get_submodule(name))
    if kind is None:
        return None
    for model in models:
        disturb_numbers(model.get_submodule(name))
    agreement = {layer: _agreement(layer, name, models) for layer in _candidates(models[0].get_submodule(name))}
    best = max(agreement, key=lambda layer: agreement[layer], default=None)
    alike = 0.97 if kind == "norm" else 0.0  # a gated product is rounded once, where transformers rounds twice
    return best if best is not None and agreement[best] > alike else Stock(kind, OTHER)


def _candidates(module: Any) -> Iterator[Layer]:
    """The layers whose attributes this module has."""
    floats = numbers_of(module)
    for eps, offset, cast in itertools.product(floats, (0.0, 1.0), get_args(Cast)):
        yield RMSNorm(eps=eps, offset=offset, cast=cast)
    yield from (LayerNorm(eps=eps) for eps in floats)
    config = getattr(module, "config", None)
    acts = [name for name, value in vars(config).items() if isinstance(value, str)] if config is not None else [None]
    for act, act_fn in itertools.product(
        acts, (n for n, v in module.__dict__["_modules"].items() if not list(v.children()))
    ):
        yield from (layer(act=act, act_fn=act_fn) for layer in (GatedMLP, FusedGatedMLP, Experts))


def _agreement(layer: Layer, name: str, models: list[Any]) -> float:
    """The share of the elements that a layer rounds in bf16 as the module does; 0 where it is another function."""
    share = 0.0
    for model in models:
        module = model.get_submodule(name)
        if layer.declines(module) is not None:
            return 0.0
        calls = recorded_calls(model, {name: layer.method}, batch(TINY["vocab_size"], CPU))
        if name not in calls:
            return 0.0
        (args, kwargs), own = calls[name], getattr(module, layer.method)
        with torch.no_grad():
            try:
                ours = layer.forward(module, *args, **kwargs)
            except (AttributeError, TypeError):  # it has not the attributes or parameters that the layer reads
                return 0.0
            theirs: Tensor = own(*args, **kwargs)
        if model is models[0] and not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
            return 0.0
        share = (ours == theirs).float().mean().item()
    return share


def _rotary_names(modeling: ModuleType, model: Any) -> list[str]:
    return sorted(rotary_functions(modeling, (m for part in language_parts(model) for m in part.modules())))


def _rotary(modeling: ModuleType, name: str, models: list[Any]) -> Callable[..., Any] | str:
    """The op that does what the rotary function `name` does, or why there is none."""
    function = getattr(modeling, name)
    known = (rotary, rotary_one, rotary_in_own_dtype)
    ops = [op for op in known if _parameters(op) == _parameters(function)]
    if not ops:
        return f"takes {', '.join(inspect.signature(function).parameters)}, as no op of liger.ops does"
    calls: list[tuple[Any, Any]] = []

    def recording(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return function(*args, **kwargs)

    setattr(modeling, name, recording)
    try:
        for model in models:
            model(**batch(TINY["vocab_size"], CPU))
    finally:
        setattr(modeling, name, function)
    alike = [op for op in ops if all(_same(op(*args, **kw), function(*args, **kw)) for args, kw in calls)]
    return alike[0] if alike else "does not rotate halves as liger.ops.rotary does"


def _parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    return [(parameter.name, parameter.default) for parameter in inspect.signature(function).parameters.values()]


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two results, tensors or tuples of them, agree in dtype and roughly in value."""
    try:
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    except AssertionError:
        return False
    return True


def _head(adapter: Adapter, model: Any) -> CausalLM | None:
    """The head with which the fused loss is the model's, or None."""
    output = model.get_output_embeddings()
    names = [name for name, module in model.named_modules() if module is output]
    paths = dict.fromkeys(re.findall(r"self\.((?:\w+\.)*\w+)", inspect.getsource(type(model))))
    numbers = [path for path in paths if isinstance(_read(model, path), float)]
    inputs = batch(TINY["vocab_size"], CPU)
    expected = model(**inputs).loss
    for name in names:
        plain = CausalLM(type(model).__name__, head=name)
        capped = [
            replace(plain, softcap=path.removeprefix("config.")) for path in numbers if path.startswith("config.")
        ]
        scaled = [replace(plain, **{how: path}) for path in numbers for how in ("logit_scale", "logit_divisor")]
        for head in (plain, *capped, *scaled):
            with apply_adapters(model, [replace(adapter, head=head)], rope=False, norm=False) as patch:
                fused = not any(declined.kind == "loss" for declined in patch.declined)
                try:
                    same = fused and torch.allclose(model(**inputs).loss, expected, rtol=1e-5)
                except Exception:  # a forward that computes its loss by itself, of logits that are not there
                    same = False
            if same and not (head == plain and _computes_with_logits(type(model))):
                return head
    return None


def _computes_with_logits(cls: type[nn.Module]) -> bool:
    """Whether the forward does arithmetic on its logits: then a head without scale and softcap is right by chance."""
    statements = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(cls.forward)))))
    assigned = [s for s in statements if isinstance(s, ast.Assign) and any(_names(t) & {"logits"} for t in s.targets)]
    return any(isinstance(node, ast.BinOp) for statement in assigned for node in ast.walk(statement.value))


def _names(tree: ast.AST) -> set[str]:
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _read(model: Any, path: str) -> Any:
    try:
        return attrgetter(path)(model)
    except AttributeError:
        return None


def expression(layer: Any) -> str:
    """A layer or a head as an adapter writes it: the fields that differ from the defaults; eps and act always."""
    said = [
        (f.name, getattr(layer, f.name))
        for f in fields(layer)
        if f.name in ("eps", "act") or getattr(layer, f.name) != f.default
    ]
    positional = isinstance(layer, (Stock, CausalLM))
    words = [_quoted(v) if positional and n in ("kind", "reason", "model") else f"{n}={_quoted(v)}" for n, v in said]
    return f"{type(layer).__name__}({', '.join(words)})"


def _quoted(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)
