"""From a model to the adapters it needs: entry points, version ranges, and what to say when one is missing."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterable
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.version import Version
from torch import nn

from liger.adapter import Adapter

GROUP = "liger.adapters"

_MODELING = re.compile(r"transformers\.models\.([^.]+)\.")
_FAMILIES = {  # a word in the model package's name → the distribution that serves its family
    r"llama": "liger-llama",
    r"mistral|mixtral|ministral": "liger-mistral",
    r"gemma": "liger-gemma",
    r"qwen": "liger-qwen",
    r"phi": "liger-phi",
}
_GUIDE = "https://github.com/liger-project/liger/blob/main/CONTRIBUTING.md#adding-a-model-family"


class NoAdapterError(LookupError):
    """No installed adapter knows any class that the model is made of."""


class AdapterConflictError(RuntimeError):
    """Two installed distributions claim the same transformers model package."""


class VersionRangeError(RuntimeError):
    """An adapter's distribution requires other versions than the installed ones."""


@dataclass(frozen=True)
class InstalledAdapter:
    """An adapter that is installed, not yet imported.

    Attributes:
        key: the transformers model package that it is for.
        distribution: the package of ours, or of somebody else's, that has it.
        version: of that distribution.
        requires: the distribution's requirements, as its metadata has them.
        entry_point: what imports it.
    """

    key: str
    distribution: str
    version: str
    requires: tuple[str, ...]
    entry_point: importlib.metadata.EntryPoint

    def out_of_range(self) -> list[str]:
        """Each requirement of the distribution that the installed packages do not meet, in words."""
        return unmet(self.requires)

    def load(self) -> Adapter:
        """Import the adapter.

        Raises:
            VersionRangeError: a requirement of its distribution is not met.
            TypeError: the entry point does not lead to an Adapter of that key.
        """
        out = self.out_of_range()
        if out:
            raise VersionRangeError(f"{self.distribution} {self.version} {'; '.join(out)}")
        adapter = self.entry_point.load()
        if not isinstance(adapter, Adapter) or adapter.key != self.key:
            raise TypeError(
                f"entry point {self.key} of {self.distribution} ({self.entry_point.value}) must be the Adapter of "
                f"transformers.models.{self.key}, not {adapter!r}"
            )
        return adapter


def unmet(requirements: Iterable[str]) -> list[str]:
    """Each requirement of a distribution, but for those of its extras, that the installed packages do not meet."""
    said = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            said.append(f"requires {requirement}, which is not installed")
            continue
        if not requirement.specifier.contains(Version(installed), prereleases=True):
            said.append(f"requires {requirement}, but {requirement.name} {installed} is installed")
    return said


def adapters() -> dict[str, InstalledAdapter]:
    """The installed adapters by transformers model package, without importing any.

    Raises:
        AdapterConflictError: two distributions claim the same package.
    """
    found: dict[str, InstalledAdapter] = {}
    for entry_point in importlib.metadata.entry_points(group=GROUP):
        distribution = entry_point.dist
        if distribution is None:  # an entry point that belongs to no installed distribution has no version range
            continue
        installed = InstalledAdapter(
            key=entry_point.name,
            distribution=distribution.name,
            version=distribution.version,
            requires=tuple(distribution.requires or ()),
            entry_point=entry_point,
        )
        other = found.get(installed.key)
        if other is not None and other.distribution != installed.distribution:
            raise AdapterConflictError(
                f"both {other.distribution} {other.version} and {installed.distribution} {installed.version} have an "
                f"adapter for {installed.key}; uninstall one"
            )
        found[installed.key] = installed
    return found


def model_packages(model: nn.Module) -> list[str]:
    """The transformers model packages that define the classes `model` is really made of, sorted."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__}
    return sorted({match[1] for cls in classes if (match := _MODELING.match(cls.__module__))})


def adapters_for(model: nn.Module) -> list[Adapter]:
    """Import the adapters whose model packages `model` is made of.

    Raises:
        NoAdapterError: there is none; the message says which distribution has it.
        AdapterConflictError, VersionRangeError: as `adapters` and `InstalledAdapter.load`.
    """
    installed, packages = adapters(), model_packages(model)
    needed = [installed[key] for key in packages if key in installed]
    if not needed:
        raise NoAdapterError(_no_adapter(model, packages, installed))
    return [adapter.load() for adapter in needed]


def _no_adapter(model: nn.Module, packages: list[str], installed: dict[str, InstalledAdapter]) -> str:
    name = type(model).__name__
    keys: dict[str, list[str]] = {}
    for key, a in sorted(installed.items()):
        keys.setdefault(f"{a.distribution} {a.version}", []).append(key)
    have = ", ".join(f"{distribution} ({', '.join(has)})" for distribution, has in sorted(keys.items())) or "none"
    if not packages:
        return f"{name} holds no module of a transformers model; installed adapters: {have}"
    hints = {distribution for key in packages for word, distribution in _FAMILIES.items() if re.search(word, key)} - {
        a.distribution for a in installed.values()
    }
    hint = f"; perhaps in: pip install {' '.join(sorted(hints))}" if hints else f"; how to write one: {_GUIDE}"
    return f"no adapter for {name} (made of {', '.join(packages)}); installed adapters: {have}{hint}"
