"""The contract between core and a model family: an adapter is a value that says which class runs which kernel.

    llama = Adapter(
        modeling="transformers.models.llama.modeling_llama",
        modules={"LlamaRMSNorm": RMSNorm(eps="variance_epsilon"), "LlamaMLP": GatedMLP(act="hidden_act")},
        functions={"apply_rotary_pos_emb": rotary},
        head=CausalLM("LlamaForCausalLM"),
    )

A package offers its adapters through the entry-point group `liger.adapters`, each under the name of its transformers
model package (`llama` of `transformers.models.llama`).
"""

from __future__ import annotations

import importlib
import importlib.metadata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from liger.subclass import Swappable

if TYPE_CHECKING:
    from liger.causal_lm import CausalLM

Kind = Literal["norm", "mlp", "experts", "rope", "loss"]


class Layer(ABC):
    """A replacement forward for modules of one shape. It owns no parameters: those stay in the module.

    A subclass is a frozen dataclass whose fields name what differs between models: attributes, constants.

    Attributes:
        kind: the switch of `liger.apply` that turns it on.
        method: the module's method that it stands for.
    """

    kind: ClassVar[Kind]
    method: ClassVar[str] = "forward"

    @abstractmethod
    def declines(self, module: Any) -> str | None:
        """Why this module must keep its own forward, or None. Reads no tensor's values: they may not be loaded yet."""

    @abstractmethod
    def forward(self, module: Any, x: Tensor) -> Tensor:
        """What that method of `module` computes of `x`."""

    def kernel(self, module: Any) -> str:
        """The name of what it runs, for the module's repr: the Layer's own unless it gives another."""
        return type(self).__name__


@dataclass(frozen=True)
class Adapter:
    """What of one transformers modeling file runs on which kernel.

    Attributes:
        modeling: the dotted path of the modeling module.
        modules: class name in that module → the Layer that its instances run. A dotted name ("nn.LayerNorm") means a
            class from elsewhere: its own instances, where their parent's class stands in that module.
        functions: name of a rotary function that forwards in that module call → the op that is called instead. The op
            must take the same parameters, by name, order and default. A string in its place says why there is none.
        head: the language-model class and its head, several of them, or None where the family has none.
    """

    modeling: str
    modules: Mapping[str, Layer] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any] | str] = field(default_factory=dict)
    head: CausalLM | tuple[CausalLM, ...] | None = None

    def __post_init__(self) -> None:
        parts = self.modeling.split(".")
        if len(parts) != 4 or parts[:2] != ["transformers", "models"]:
            raise ValueError(f"Adapter: modeling must read 'transformers.models.<model>.<file>', not {self.modeling!r}")
        for name, layer in self.modules.items():
            if not isinstance(layer, Layer):
                raise TypeError(f"Adapter {self.key}: modules[{name!r}] must be a Layer, not {layer!r}")
        object.__setattr__(self, "modules", MappingProxyType(dict(self.modules)))
        object.__setattr__(self, "functions", MappingProxyType(dict(self.functions)))

    @property
    def key(self) -> str:
        """The transformers model package, which is also the entry point's name."""
        return self.modeling.split(".")[2]

    @property
    def heads(self) -> tuple[CausalLM, ...]:
        """The language-model classes, however many."""
        if self.head is None:
            return ()
        return self.head if isinstance(self.head, tuple) else (self.head,)

    def module(self) -> ModuleType:
        """The modeling module, imported.

        Raises:
            ModuleNotFoundError: the installed transformers does not have this model.
            AttributeError: a class or function that the adapter names does not stand in it.
        """
        try:
            module = importlib.import_module(self.modeling)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{self.modeling}.".startswith(f"{error.name}."):
                raise  # something that the file imports
            installed = importlib.metadata.version("transformers")
            message = f"adapter {self.key}: transformers {installed} has no {self.modeling}"
            raise ModuleNotFoundError(message, name=error.name) from error
        named = [*self.modules, *self.functions, *(head.model for head in self.heads)]
        missing = [name for name in named if _get(module, name) is None]
        if missing:
            raise AttributeError(f"adapter {self.key} names {', '.join(missing)}, which {self.modeling} does not have")
        return module

    def layers_of(self, cls: type, parent: type) -> Iterator[tuple[str, type, Layer]]:
        """Each (name, class, Layer) that is meant by a module of class `cls` whose parent's class is `parent`.

        The class is the one that the modeling module defined, or what another library has put in its place there.
        """
        module, ours = self.module(), any(base.__module__ == self.modeling for base in parent.__mro__)
        for name, layer in self.modules.items():
            target, foreign = _get(module, name), "." in name
            known = (c for c in cls.__mro__ if c is target or _is_defined_as(c, self.modeling, name))
            found = next(known, None)
            if found is not None and (not foreign or (ours and _own_class(cls) is target)):
                yield name, found, layer


def _get(module: ModuleType, dotted: str) -> Any:
    value: Any = module
    for name in dotted.split("."):
        value = getattr(value, name, None)
    return value


def _is_defined_as(cls: type, modeling: str, name: str) -> bool:
    return (cls.__module__, cls.__qualname__) == (modeling, name) and not issubclass(cls, Swappable)


def _own_class(cls: type) -> type:
    """The class that `cls` was before `liger.apply` or torch's FSDP derived another from it."""
    derived = (issubclass(c, Swappable) or c.__module__.startswith("torch.distributed.") for c in cls.__mro__)
    return next(c for c, is_derived in zip(cls.__mro__, derived, strict=True) if not is_derived)
