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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from liger.causal_lm import CausalLM

Kind = Literal["norm", "mlp", "rope", "loss"]


class Layer(ABC):
    """A replacement forward for modules of one shape. It owns no parameters: those stay in the module.

    A subclass is a frozen dataclass whose fields name what differs between models: attributes, constants.
    """

    kind: ClassVar[Kind]

    @abstractmethod
    def declines(self, module: Any) -> str | None:
        """Why this module must keep its own forward, or None. Reads no tensor's values: they may not be loaded yet."""

    @abstractmethod
    def forward(self, module: Any, x: Tensor) -> Tensor:
        """What `module` computes of `x`."""


@dataclass(frozen=True)
class Adapter:
    """What of one transformers modeling file runs on which kernel.

    Attributes:
        modeling: the dotted path of the modeling module.
        modules: class name in that module → the Layer that its instances run.
        functions: name of a rotary function that forwards in that module call → the op that is called instead. The op
            must take the same parameters, by name, order and default.
        head: the language-model class and its head, or None where the family has none.
    """

    modeling: str
    modules: Mapping[str, Layer] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    head: CausalLM | None = None

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

    def module(self) -> ModuleType:
        """The modeling module, imported.

        Raises:
            AttributeError: a class or function that the adapter names does not stand in it.
        """
        module = importlib.import_module(self.modeling)
        named = [*self.modules, *self.functions, *([self.head.model] if self.head else [])]
        missing = [name for name in named if not hasattr(module, name)]
        if missing:
            raise AttributeError(f"adapter {self.key} names {', '.join(missing)}, which {self.modeling} does not have")
        return module
