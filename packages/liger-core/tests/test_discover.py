"""Entry points to adapters: conflicts, ranges, and what a user reads when something is missing."""

from __future__ import annotations

import importlib.metadata
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import LlamaConfig, Olmo2Config, PhiConfig
from transformers.models.llama.modeling_llama import LlamaModel
from transformers.models.olmo2.modeling_olmo2 import Olmo2Model
from transformers.models.phi.modeling_phi import PhiModel

import liger
from liger import discover
from liger.apply_liger_kernel import apply_liger_kernel
from liger.testing import TINY


class Entry(SimpleNamespace):
    """An entry point of a distribution that is not really installed."""

    def load(self):
        return self.loads


def entry(key, distribution, requires=(), loads=None):
    dist = SimpleNamespace(name=distribution, version="1.2.3", requires=list(requires))
    return Entry(name=key, value=f"{key}:{key}", dist=dist, loads=loads)


@pytest.fixture
def install(monkeypatch):
    def install(*entries):
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [e for e in entries if group])

    return install


@pytest.fixture
def llama_model():
    return LlamaModel(LlamaConfig(**TINY))


def test_no_adapter_names_what_is_installed_and_what_to_install(install, llama_model):
    install(entry("phi3", "liger-phi"), entry("gemma", "liger-gemma"), entry("phi", "liger-phi"))
    with pytest.raises(liger.NoAdapterError) as error:
        liger.apply(llama_model)
    assert str(error.value) == (
        "no adapter for LlamaModel (made of llama); installed adapters: liger-gemma 1.2.3 (gemma), "
        "liger-phi 1.2.3 (phi, phi3); perhaps in: pip install liger-llama"
    )


def test_for_a_model_of_no_family_the_guide_is_named(install):
    install()
    with pytest.raises(liger.NoAdapterError, match=r"\(made of olmo2\).*: none; how to write one: (.+)#(.+)") as error:
        liger.apply(Olmo2Model(Olmo2Config(**TINY)))
    assert discover._GUIDE in str(error.value)


def test_a_model_that_is_not_of_transformers(install):
    install()
    with pytest.raises(liger.NoAdapterError, match="Linear holds no module of a transformers model"):
        liger.apply(nn.Linear(2, 2))


def test_no_module(llama_model):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not dict"):
        liger.apply({"model": llama_model})


def test_two_packages_that_claim_one_model(install, llama_model):
    install(entry("llama", "liger-llama"), entry("llama", "other-llama"))
    with pytest.raises(liger.AdapterConflictError, match=r"both liger-llama 1.2.3 and other-llama 1.2.3"):
        liger.apply(llama_model)


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("transformers>=4,<5", r"requires transformers<5,>=4, but transformers \S+ is installed"),
        ("liger-core>=99", r"requires liger-core>=99, but liger-core \S+ is installed"),
        ("not-a-package-of-this-world>=1", "which is not installed"),
    ],
)
def test_out_of_range_changes_nothing_and_says_by_how_much(install, llama_model, requirement, said):
    before = [type(m) for m in llama_model.modules()]
    install(entry("llama", "liger-llama", [requirement]))
    with pytest.raises(liger.VersionRangeError, match=f"liger-llama 1.2.3 .*{said}"):
        liger.apply(llama_model)
    assert [type(m) for m in llama_model.modules()] == before


def test_requirements_of_extras_and_other_platforms_do_not_count(install):
    install(entry("llama", "liger-llama", ['pytest>=99; extra == "testing"', 'x>=1; sys_platform == "nowhere"']))
    assert liger.adapters()["llama"].out_of_range() == []


def test_an_entry_point_that_leads_elsewhere(install, llama_model):
    install(entry("llama", "liger-llama", loads="not an adapter"))
    with pytest.raises(TypeError, match=r"must be the Adapter of transformers.models.llama, not 'not an adapter'"):
        liger.apply(llama_model)


def test_only_the_adapters_that_the_model_is_made_of_are_imported(install, llama_model):
    adapter = liger.Adapter(modeling="transformers.models.llama.modeling_llama")
    install(entry("llama", "liger-llama", loads=adapter), entry("phi", "liger-phi", ["transformers>=99"]))
    assert discover.adapters_for(llama_model) == [adapter]


def test_a_model_that_holds_two_families(install):
    both = nn.ModuleList([LlamaModel(LlamaConfig(**TINY)), PhiModel(PhiConfig(**{**TINY, "num_hidden_layers": 1}))])
    assert discover.model_packages(both) == ["llama", "phi"]


def test_an_adapter_that_names_a_class_that_is_not_there():
    adapter = liger.Adapter(modeling="transformers.models.llama.modeling_llama", functions={"no_such": torch.add})
    with pytest.raises(AttributeError, match="adapter llama names no_such, which transformers.models.llama"):
        adapter.module()


def test_an_adapter_for_a_model_that_this_transformers_does_not_have(install, llama_model):
    """It is an error where it is used, and no hindrance beside others."""
    future = liger.Adapter(modeling="transformers.models.llama99.modeling_llama99")
    llama = liger.Adapter(modeling="transformers.models.llama.modeling_llama")
    install(entry("llama99", "liger-llama", loads=future), entry("llama", "liger-llama", loads=llama))
    assert discover.adapters_for(llama_model) == [llama]
    message = rf"^adapter llama99: transformers {transformers.__version__} has no transformers.models.llama99"
    for use in (future.module, apply_liger_kernel(future)):
        with pytest.raises(ModuleNotFoundError, match=message):
            use()


def test_an_adapter_that_is_not_one():
    with pytest.raises(TypeError, match=r"modules\['LlamaMLP'\] must be a Layer, not 'swiglu'"):
        liger.Adapter(modeling="transformers.models.llama.modeling_llama", modules={"LlamaMLP": "swiglu"})
    with pytest.raises(ValueError, match=r"must read 'transformers.models.<model>.<file>', not 'my.model'"):
        liger.Adapter(modeling="my.model")
