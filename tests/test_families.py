"""All families together: in one process, patched beside unpatched, and every field of every adapter under test."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from importlib.metadata import entry_points

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.phimoe import modeling_phimoe

import liger
from contracts import contracts
from liger.adapter import Adapter, Layer
from liger.causal_lm import CausalLM
from liger.layers import Stock
from liger.patch import apply_adapters
from liger.testing import TINY, AdapterContract
from liger.testing.parity import assert_same_step, in_fp64
from liger.testing.tiny import batch, build

pytestmark = pytest.mark.usefixtures("no_interpreter")

CONTRACTS = contracts()
each_contract = pytest.mark.parametrize("contract", CONTRACTS.values(), ids=CONTRACTS)


@pytest.fixture(autouse=True)
def best_experts(monkeypatch):
    """PhiMoE samples its experts while it trains: take the best ones, as it does in evaluation."""
    sampling = modeling_phimoe.sparsemixer

    def best(scores, jitter_eps, training, top_k=2):
        return sampling(scores, jitter_eps, False, top_k)

    monkeypatch.setattr(modeling_phimoe, "sparsemixer", best)


def test_every_installed_adapter_has_a_contract():
    installed = {entry.name for entry in entry_points(group="liger.adapters")}
    assert installed == {contract.adapter.key for contract in CONTRACTS.values()}


# Two families, and models beside each other.


@pytest.fixture
def llama(device):
    return build(LlamaForCausalLM, LlamaConfig(**TINY), device)


@pytest.fixture
def mixtral(device):
    return build(MixtralForCausalLM, MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2), device)


def test_two_families_in_one_model_and_one_of_them_unpatched_beside_it(llama, mixtral, device):
    """What was applied to one model is in that model: a copy of each stays as it was, whatever runs first."""
    stock = copy.deepcopy(llama), copy.deepcopy(mixtral)
    patch = liger.apply(nn.ModuleDict({"llama": llama, "mixtral": mixtral}))
    assert {s.name.partition(".")[0] for s in patch.swapped} == {"llama", "mixtral"}
    assert {s.kind for s in patch.swapped} == {"norm", "mlp", "experts", "rope", "loss"}
    inputs = batch(TINY["vocab_size"], device)
    for patched, own in zip((llama, mixtral), stock, strict=True):
        assert all("liger" not in repr(vars(type(module)).get("_recipe")) for module in own.modules())
        assert_same_step(patched, own, in_fp64(own), inputs)
    patch.undo()
    for patched, own in zip((llama, mixtral), stock, strict=True):
        assert [type(module) for module in patched.modules()] == [type(module) for module in own.modules()]


@each_contract
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_model_is_verified(contract, device, dtype):
    test = contract()
    model = test.model(device, dtype)
    test.apply(model)
    for inputs in (None, test.inputs(model)):
        report = liger.verify(model, inputs=inputs)
        assert report.ok, str(report)


@each_contract
def test_apply_undo_apply(contract, device):
    test = contract()
    model = test.model(device)
    classes, results = [], []
    for _ in range(2):
        with test.apply(model) as patch:
            classes.append([type(module) for module in model.modules()])
            results.append((patch.swapped, patch.declined, model(**test.inputs(model)).loss))
    assert classes[0] == classes[1]
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])


@each_contract
def test_a_model_class_that_another_library_has_derived(contract, device):
    """One that only adds is patched like its base; one with a forward of its own keeps it, with its parts patched."""
    test = contract()
    base = getattr(test.adapter.module(), test.language_model)

    def forward(self, *args, **kwargs):
        output = base.forward(self, *args, **kwargs)
        output.loss = output.loss * 2
        return output

    adds = type("Adds", (base,), {"extra": lambda self: 42})
    overrides = type("Overrides", (base,), {"forward": functools.wraps(base.forward)(forward)})
    models = [build(cls, test.config(), device) for cls in (base, adds, overrides)]
    losses = [model(**test.inputs(model)).loss for model in models]
    patches = [test.apply(model) for model in models]
    assert [s.name for s in patches[1].swapped] == [s.name for s in patches[0].swapped]
    assert models[1].extra() == 42
    assert isinstance(models[1], adds)
    assert {s.name for s in patches[2].swapped} == {s.name for s in patches[0].swapped if s.kind != "loss"}
    assert any("Overrides overrides its forward" in d.reason for d in patches[2].declined)
    for model, loss in zip(models, losses, strict=True):
        torch.testing.assert_close(model(**test.inputs(model)).loss, loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("model", "softcap", "does"), [("Gemma2", None, "mentions a"), ("Gemma", "intermediate_size", "mentions no")]
)
def test_a_softcap_that_adapter_and_forward_do_not_agree_on_is_declined(device, model, softcap, does):
    adapter = CONTRACTS[f"liger-gemma Test{model}"].adapter
    adapter = dataclasses.replace(adapter, head=dataclasses.replace(adapter.head, softcap=softcap))
    cls = getattr(adapter.module(), f"{model}ForCausalLM")
    declined = apply_adapters(build(cls, cls.config_class(**TINY), device), [adapter]).declined
    reason = f"its forward {does} softcap, and the adapter's is {softcap}"
    assert {(d.kind, d.reason) for d in declined} == {("loss", reason)}


# Every field of every adapter.


def wrong_values(owner: object, field: str, value: object) -> Iterator[object]:
    """Values that the field of a layer or of a head must not have."""
    others = {
        "cast": {"llama": "gemma", "gemma": "llama"},
        "loss": {"ForCausalLMLoss": "ForMaskedLMLoss", "ForMaskedLMLoss": "ForCausalLMLoss"},
        "kind": {"mlp": "norm", "norm": "mlp", "experts": "mlp"},
    }
    if field in others:
        yield others[field][value]
    elif isinstance(value, float):
        yield 1.0 - value
    elif value is None:
        scale = "config." if field.startswith("logit_") else ""
        yield f"{scale}initializer_range" if isinstance(owner, CausalLM) else "misspelt"
    else:
        yield f"misspelt_{value}"
        if field in ("softcap", "dropout"):
            yield None


def mutated(owner: Layer | CausalLM) -> Iterator[tuple[str, Layer | CausalLM]]:
    for field in dataclasses.fields(owner):
        for value in wrong_values(owner, field.name, getattr(owner, field.name)):
            yield f"{field.name}={value!r}", dataclasses.replace(owner, **{field.name: value})


def twisted(op):
    """An op that takes what `op` takes, and gives its first result twisted."""

    @functools.wraps(op)
    def twist(*args, **kwargs):
        result = op(*args, **kwargs)
        return (result[0].flip(-1), *result[1:]) if isinstance(result, tuple) else result.flip(-1)

    return twist


def widened(op):
    """An op whose signature has one parameter more."""

    @functools.wraps(op)
    def wide(*args, **kwargs):
        return op(*args, **kwargs)

    parameters = list(inspect.signature(op).parameters.values())
    more = inspect.Parameter("more", inspect.Parameter.KEYWORD_ONLY, default=None)
    wide.__signature__ = inspect.Signature([*parameters, more])
    return wide


def mutants(adapter: Adapter) -> Iterator[tuple[str, Adapter]]:
    """The adapter with one field of it, of a layer or of a head wrong: (what, adapter)."""

    def but(**changes):
        return dataclasses.replace(adapter, **changes)

    yield "modeling", but(modeling="transformers.models.gpt2.modeling_gpt2")
    for name, layer in adapter.modules.items():
        others = {n: other for n, other in adapter.modules.items() if n != name}
        yield f"modules {name} misspelt", but(modules={**others, f"{name}X": layer})
        for what, changed in mutated(layer):
            yield f"modules {name} {what}", but(modules={**others, name: changed})
    for name, op in adapter.functions.items():
        others = {n: other for n, other in adapter.functions.items() if n != name}
        yield f"functions {name} misspelt", but(functions={**others, f"{name}X": op})
        if isinstance(op, str):
            yield f"functions {name} reason", but(functions={**others, name: "for no reason"})
            continue
        yield f"functions {name} twisted", but(functions={**others, name: twisted(op)})
        yield f"functions {name} widened", but(functions={**others, name: widened(op)})
    for at, head in enumerate(adapter.heads):
        for what, changed in mutated(head):
            yield f"head {head.model} {what}", but(head=(*adapter.heads[:at], changed, *adapter.heads[at + 1 :]))


def is_equivalent(adapter: Adapter, what: str) -> bool:
    """Whether the mutant computes what the adapter does: a norm without a weight has nothing to offset or to round."""
    _, name, change = [*what.split(" ", 2), "", ""][:3]
    weightless = name in ("Llama4TextL2Norm", "nn.RMSNorm")
    return weightless and change.startswith(("offset", "cast"))


CHECKS = [
    ("test_every_target_is_found_and_used", {}),
    ("test_each_module_equals_its_original", {"path": "reference", "dtype": torch.float32}),
    ("test_each_module_equals_its_original", {"path": "reference", "dtype": torch.bfloat16}),
    ("test_loss_and_gradients", {"path": "reference", "dtype": torch.float32}),
]


def is_red(contract: type[AdapterContract], device: torch.device) -> bool:
    test = contract()
    try:
        for name, options in CHECKS:
            if getattr(contract, name) is getattr(AdapterContract, name):
                getattr(test, name)(device, **options)
    except Exception:
        return True
    return False


KEYS = sorted({contract.adapter.key for contract in CONTRACTS.values()})


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_field_turns_a_test_red_and_the_sound_adapter_none(key, device):
    suites = [contract for contract in CONTRACTS.values() if contract.adapter.key == key]
    adapter = suites[0].adapter
    assert not any(is_red(suite, device) for suite in suites), "the sound adapter is red"
    green = []
    for what, mutant in mutants(adapter):
        broken = [type(suite.__name__, (suite,), {"adapter": mutant}) for suite in suites]
        if not is_equivalent(adapter, what) and not any(is_red(suite, device) for suite in broken):
            green.append(what)
    assert not green


def test_a_reason_must_be_the_expected_one():
    assert all(
        contract.declines
        for contract in CONTRACTS.values()
        if any(isinstance(layer, Stock) for layer in contract.adapter.modules.values())
        or any(isinstance(op, str) for op in contract.adapter.functions.values())
    )
