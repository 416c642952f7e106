"""`python -m liger explain`: what `liger.apply` would do to a model, from its config alone.

The model is built on the meta device: no weights, no download, no code from a checkpoint.

The document: `source` (what was given), `model` (`class`, `model_type`), `adapters` (`model`, `distribution`,
`version`), `swapped` (`name`, `kind`, `class`, `runs`), `declined` (`name`, `kind`, `class`, `reason`), `untouched`
(`name`, `class`: what no kernel is meant for) and `notes`, on what may make it otherwise.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

import liger
from liger.cli.answer import Answer, RefusalError, Table
from liger.disabled import DISABLED
from liger.discover import adapters_for, model_packages
from liger.plan import plan

_NO_KERNEL = "no kernel is meant for it"
_QUANTISED = "quantization_config: loading the weights replaces linear layers, perhaps the head; that is not seen here."
_DISABLED = "LIGER_DISABLE is set: as long as it is, liger.apply swaps nothing."


def explain(source: str, *, each_module: bool = False) -> Answer:
    """What would be swapped in a model of that config, what not, and why.

    Args:
        source: a model type of transformers ("llama", with its default config), a config.json, or the directory of one.
        each_module: the page has a line for every module, not one for every kind.

    Raises:
        RefusalError: no adapter knows the model, or one that does cannot be used (1); the source cannot be read, or
            transformers cannot build its model (2).
    """
    values = _values(source)
    model = _on_meta(values, source)
    try:
        planned = plan(model, adapters_for(model))
    except (liger.NoAdapterError, liger.VersionRangeError, liger.AdapterConflictError) as error:
        raise RefusalError(str(error), status=1) from error
    touched = {s.name for s in planned.swapped} | {d.name for d in planned.declined}
    installed = liger.adapters()
    data: dict[str, Any] = {
        "source": source,
        "model": {"class": type(model).__name__, "model_type": model.config.model_type},
        "adapters": [
            {"model": key, "distribution": installed[key].distribution, "version": installed[key].version}
            for key in model_packages(model)
            if key in installed
        ],
        "swapped": [{"name": s.name, "kind": s.kind, "class": s.cls, "runs": s.runs} for s in planned.swapped],
        "declined": [{"name": d.name, "kind": d.kind, "class": d.cls, "reason": d.reason} for d in planned.declined],
        "untouched": [
            {"name": name, "class": type(module).__name__}
            for name, module in model.named_modules()
            if name not in touched
        ],
        "notes": [*([_QUANTISED] if "quantization_config" in values else []), *([_DISABLED] if DISABLED else [])],
    }
    tables = [_by_module(model, data)] if each_module else _by_kind(data)
    return Answer("explain", data, [_title(data), *tables, *data["notes"]])


def _values(source: str) -> dict[str, Any]:
    """What the config states, of which `model_type` is one that transformers has; nothing else for a model type."""
    path = Path(source)
    if (path / "config.json").is_file():
        path = path / "config.json"
    transformers = _transformers()
    known = transformers.CONFIG_MAPPING
    if not path.is_file():
        if source in known:
            return {"model_type": source}
        close = difflib.get_close_matches(source, list(known.keys()))
        raise RefusalError(
            f"{source!r} is no config.json, no directory with one, and no model type of transformers "
            f"{transformers.__version__}" + (f"; did you mean {', '.join(close)}?" if close else ""),
            status=2,
        )
    try:
        values: dict[str, Any] = json.loads(path.read_text("utf-8"))
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusalError(f"{path} is not the config of a model: {type(error).__name__}: {error}", status=2) from error
    if model_type not in known:
        message = f"transformers {transformers.__version__} has no model type {model_type!r}, which {path} names"
        remote = "; its code comes with the checkpoint (auto_map), and is not run" if "auto_map" in values else ""
        raise RefusalError(message + remote, status=2)
    return values


def _on_meta(values: dict[str, Any], source: str) -> Any:
    """The model of a config, without memory."""
    try:
        config = _transformers().CONFIG_MAPPING[values["model_type"]].from_dict(values)
        with torch.device("meta"):
            return _build(config)
    except Exception as error:  # of transformers: a missing package, a config that its model cannot take
        reason = " ".join(str(error).split())
        message = f"transformers cannot build the model of {source}: {type(error).__name__}: {reason}"
        raise RefusalError(message, status=2) from error


def _build(config: Any) -> nn.Module:
    """Of the class that the config names, or of the first that transformers has for its type."""
    transformers = _transformers()
    for name in config.architectures or ():
        cls = getattr(transformers, name, None)
        if isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel):
            return cls(config)
    tasks = ("ForCausalLM", "ForSeq2SeqLM", "ForImageTextToText", "ForMultimodalLM", "")
    autos = (getattr(transformers, f"AutoModel{task}") for task in tasks)
    auto = next((auto for auto in autos if type(config) in auto._model_mapping), transformers.AutoModel)
    return auto.from_config(config, trust_remote_code=False)


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise RefusalError(f"explain needs transformers: {error}", status=2) from error
    return transformers


def _title(data: dict[str, Any]) -> str:
    model, adapters = data["model"], data["adapters"]
    by = ", ".join(f"{a['distribution']} {a['version']} ({a['model']})" for a in adapters)
    return f"{model['class']}, model type {model['model_type']}, by {by}"


def _by_kind(data: dict[str, Any]) -> list[str | Table]:
    """Modules of one class with one outcome in one row."""
    page: list[str | Table] = []
    for outcome, key, title in (("swapped", "runs", "runs"), ("declined", "reason", "keeps transformers' code")):
        counted = Counter((part["kind"], part["class"], part[key]) for part in data[outcome])
        if counted:
            rows = [(kind, str(count), cls, what) for (kind, cls, what), count in counted.items()]
            page.append(Table(("part", "modules", "class", title), rows, numbers=frozenset({"modules"})))
    untouched = Counter(module["class"] for module in data["untouched"])
    rest = ", ".join(f"{count} {cls}" for cls, count in untouched.most_common())
    return [*page, f"Left as they are, {_NO_KERNEL}: {rest}."]


def _by_module(model: nn.Module, data: dict[str, Any]) -> Table:
    """Every module in the model's order; one that is swapped for two things has two rows."""
    rows: dict[str, list[tuple[str, ...]]] = {name: [] for name, _ in model.named_modules()}
    for part in data["swapped"]:
        rows[part["name"]].append((part["kind"], part["class"], "swapped", part["runs"]))
    for part in data["declined"]:
        rows[part["name"]].append((part["kind"], part["class"], "declined", part["reason"]))
    for part in data["untouched"]:
        rows[part["name"]].append(("–", part["class"], "untouched", _NO_KERNEL))
    lines = [(name or "(the model)", *row) for name, found in rows.items() for row in found]
    return Table(("module", "part", "class", "is", "what it runs, or why"), lines)
