"""The READMEs say of every model what the adapters do, and the table leaves nothing out."""

from __future__ import annotations

import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from torch import nn

import support_table
from contracts import contracts
from liger.testing.unnamed import language_parts

ROOT = Path(__file__).parent.parent
CONTRACTS = contracts()


@pytest.fixture(scope="module")
def rows():
    return support_table.supports()


def test_no_page_is_stale():
    stale = [str(path.relative_to(ROOT)) for path, text in support_table.pages().items() if path.read_text() != text]
    assert not stale, "hatch run table --write"


def test_every_adapter_has_its_row_in_its_package(rows):
    installed = {(entry.dist.name, entry.name) for entry in entry_points(group="liger.adapters")}
    assert {(row.package, row.key) for row in rows} == installed


@pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)
def test_what_the_table_calls_absent_is_not_there(contract):
    """A norm, an MLP or experts that the adapter does not speak of would look in the table as if there were none."""
    test = contract()
    with torch.device("meta"):
        model = getattr(test.adapter.module(), test.language_model)(test.config())
    patch = test.apply(model)
    spoken_of = {part.name for part in (*patch.swapped, *patch.declined)}
    ends = re.compile("(Norm|NormGated|MLP|Mlp|Experts)$")
    text = {part for whole in language_parts(model) for part in whole.modules()}
    own = (test.adapter.modeling, nn.modules.normalization.__name__)  # a language model of another file has its own row
    there = {name for name, part in model.named_modules() if part in text and type(part).__module__ in own}
    there = {name for name in there if ".embed_tokens_extend." not in name}  # Phi-4-multimodal's towers
    assert {name for name in there if ends.search(type(model.get_submodule(name)).__name__)} <= spoken_of


def test_a_cell_says_what_runs_and_why_the_rest_does_not():
    rows = [
        support_table.Support(
            "liger-x", "x", "XForCausalLM", {"norm", "loss"}, {"norm": {"`A`: odd"}, "rope": {"`B`: r"}}
        ),
        support_table.Support("liger-y", "y", "YForCausalLM", {"norm"}, {"rope": {"`B`: r"}}),
    ]
    lines = support_table.table(rows, with_package=True).splitlines()
    assert lines[2] == "| `liger-x` | `x` | `XForCausalLM` | ✓ (1) | – | – | (2) | ✓ |"
    assert lines[3] == "| `liger-y` | `y` | `YForCausalLM` | ✓ | – | – | (2) | – |"
    assert lines[-2:] == ["1. `A`: odd.", "2. `B`: r."]


def test_a_page_without_the_markers_is_an_error(tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("no markers")
    monkeypatch.setattr(support_table, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="README.md needs the lines"):
        support_table._updated(page, "table")
