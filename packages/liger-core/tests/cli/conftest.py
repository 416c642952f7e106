"""The command line in this process, with adapters that are not really installed."""

from __future__ import annotations

import importlib.metadata
import json
from types import SimpleNamespace

import pytest

from adapted_models import LLAMA
from liger import discover
from liger.__main__ import main


class Entry(SimpleNamespace):
    """An entry point of a distribution that is not really installed."""

    def load(self):
        if isinstance(self.loads, Exception):
            raise self.loads
        return self.loads


@pytest.fixture
def install(monkeypatch):
    """Makes these the only adapters: (model package, distribution, what the entry point leads to, requirements)."""
    real = importlib.metadata.entry_points

    def install(*adapters):
        entries = [
            Entry(
                name=key,
                value=f"{distribution.replace('-', '_')}:{key}",
                dist=SimpleNamespace(name=distribution, version="1.2.3", requires=list(requires)),
                loads=loads,
            )
            for key, distribution, loads, *requires in adapters
        ]

        def entry_points(**selection):
            return entries if selection.get("group") == discover.GROUP else real(**selection)

        monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)

    return install


@pytest.fixture
def llama(install):
    """The adapter of LLaMA, installed alone."""
    install(("llama", "liger-llama", LLAMA, "liger-core>=0.1,<1", 'pytest; extra == "testing"'))
    return LLAMA


@pytest.fixture
def run(capsys):
    """Runs a command: its exit status, and what it wrote to stdout and stderr."""

    def run(*arguments):
        status = main([str(argument) for argument in arguments])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def document(run):
    """Runs a command with --json: its exit status and its document."""

    def document(*arguments):
        status, out, _ = run(*arguments, "--json")
        return status, json.loads(out)

    return document
