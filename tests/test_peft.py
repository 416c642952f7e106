"""PEFT's adapters on a patched model: they train as they do on the stock one, whichever was put on first.

Over 300 lines: each test goes through the same adapters.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.phi.modeling_phi import PhiForCausalLM

import liger
from liger.lazy_logits import LazyLogits
from liger.subclass import Swappable
from liger.testing import TINY, assert_as_exact_as
from liger.testing.parity import MODEL_DEPTH, assert_each_as_exact_as
from liger.testing.tiny import batch, build

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("no_interpreter"),
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
]


def lora(*targets, **options):
    targets = targets[0] if targets == ("all-linear",) else list(targets)
    return peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, init_lora_weights=False, **options)


Q = "q_proj"
CONFIGS = {
    "LoRA on q and v": lora(Q, "v_proj"),
    "LoRA on all linear layers": lora("all-linear"),
    "LoRA on the head": lora(Q, "lm_head"),
    "DoRA on all linear layers": lora("all-linear", use_dora=True),
    "DoRA on the head": lora(Q, "lm_head", use_dora=True),
    "rsLoRA with a bias": lora(Q, lora_bias=True, use_rslora=True),
    "head and norm saved": lora(Q, modules_to_save=["lm_head", "norm"]),
    "embeddings and head saved": lora(Q, modules_to_save=["embed_tokens", "lm_head"]),
    "LoRA on the head's parameter": lora(Q, target_parameters=["lm_head.weight"]),
    "trainable tokens beside LoRA": lora(Q, trainable_token_indices=[3, 5, 40]),
    "trainable tokens": peft.TrainableTokensConfig(task_type="CAUSAL_LM", token_indices=[3, 5, 40]),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "prefix tuning": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "IA3": peft.IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norm tuning": peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm", "norm"]),
}
IN_FP32 = {
    "VeRA on q and v": peft.VeraConfig(task_type="CAUSAL_LM", r=2, target_modules=[Q, "v_proj"]),
    "LoHa on up": peft.LoHaConfig(task_type="CAUSAL_LM", r=2, target_modules=["up_proj"], init_weights=False),
}
"""Whose outputs under autocast are fp32, beside those of a projection without an adapter."""

UNFUSED = {"LoRA on the head", "DoRA on the head", "LoRA on the head's parameter"}
"""What changes the head's output, so that its logits are computed."""

TIED_AND_UNFUSED = {"trainable tokens beside LoRA", "trainable tokens"}
"""The same where the embeddings are tied."""


def base(device, tied=False):
    return build(LlamaForCausalLM, LlamaConfig(**TINY, tie_word_embeddings=tied), device)


def adapted(model, config, order, **switches):
    """(the PeftModel, the Patch) of a model that is patched before PEFT wraps it, after, or inside it."""
    if order == "apply, then PEFT":
        patch = liger.apply(model, **switches)
        return peft.get_peft_model(model, copy.deepcopy(config)), patch
    wrapped = peft.get_peft_model(model, copy.deepcopy(config))
    return wrapped, liger.apply(wrapped if order == "PEFT, then apply" else wrapped.get_base_model(), **switches)


def pair_of(model, config, order, **switches):
    """(stock, patched) PeftModels with the same weights, and the Patch."""
    stock = peft.get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
    patched, patch = adapted(copy.deepcopy(model), config, order, **switches)
    with torch.no_grad():
        for parameter in (p for p in stock.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn_like(parameter))
    patched.load_state_dict(stock.state_dict())
    return stock.train(), patched.train(), patch


def assert_trains_the_same(stock, patched, inputs):
    losses = []
    for model in (stock, patched):
        model.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    theirs = {name: p.grad for name, p in stock.named_parameters() if p.requires_grad}
    ours = {name: p.grad for name, p in patched.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    assert any(grad is not None and grad.any() for grad in theirs.values())
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


ORDERS = ["apply, then PEFT", "PEFT, then apply", "PEFT, then apply inside"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_adapter_trains_as_on_the_stock_model(device, name, tied, order):
    config = CONFIGS[name]
    inputs = batch(TINY["vocab_size"], device)
    stock, patched, patch = pair_of(base(device, tied), config, order)
    assert_trains_the_same(stock, patched, inputs)

    fused = name not in UNFUSED and not (tied and name in TIED_AND_UNFUSED)
    assert isinstance(patched(**inputs).logits, LazyLogits) == fused
    later = patch if order != ORDERS[0] else liger.apply(patched)
    reasons = {d.reason for d in later.declined if d.name.endswith("lm_head")}
    assert bool(reasons) == (not fused)
    assert all("lm_head is peft." in reason and "not torch.nn.Linear" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["LoRA on the head", "DoRA on the head", "head and norm saved"])
def test_adapters_in_fp32_on_a_model_in_bf16(device, name):
    inputs = batch(TINY["vocab_size"], device)
    only_the_loss = {"norm": False, "mlp": False, "rope": False}
    stock, patched, _ = pair_of(base(device).bfloat16(), CONFIGS[name], ORDERS[0], **only_the_loss)
    exact = copy.deepcopy(stock).double()
    losses = []
    for model in (patched, stock, exact):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    assert losses[0].dtype == torch.float32
    assert_as_exact_as(losses[0], losses[1], losses[2], "loss", depth=MODEL_DEPTH, computed_in=torch.bfloat16)
    named = zip(patched.named_parameters(), stock.parameters(), exact.parameters(), strict=True)
    gradients = {name: (ours.grad, theirs.grad, e.grad) for (name, ours), theirs, e in named}
    assert any("lm_head" in name and grad is not None for name, (grad, *_) in gradients.items())
    assert_each_as_exact_as(gradients, depth=MODEL_DEPTH, alone_from=None)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["LoRA on the head", "head and norm saved", "trainable tokens beside LoRA"])
def test_disabled_merged_and_unloaded(device, name, order):
    inputs = batch(TINY["vocab_size"], device)
    model = base(device)
    stock, patched, _ = pair_of(model, CONFIGS[name], order)
    plain = model(**inputs).loss
    with patched.disable_adapter():
        torch.testing.assert_close(patched(**inputs).loss, plain)
    trained = stock(**inputs).loss
    assert not torch.isclose(trained, plain)
    torch.testing.assert_close(patched(**inputs).loss, trained)
    stock, patched = (wrapped.merge_and_unload().requires_grad_(True) for wrapped in (stock, patched))
    assert_trains_the_same(stock, patched, inputs)
    torch.testing.assert_close(patched(**inputs).loss, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["LoRA on the head", "head and norm saved"])
def test_several_adapters_of_which_one_is_active(device, name, order):
    inputs = batch(TINY["vocab_size"], device)
    model = base(device)
    stock, patched, _ = pair_of(model, CONFIGS[name], order)
    for wrapped in (stock, patched):
        wrapped.add_adapter("second", copy.deepcopy(CONFIGS[name]))
    with torch.no_grad():
        for parameter in (p for n, p in stock.named_parameters() if "second" in n):
            parameter.add_(0.1 * torch.randn_like(parameter))
    patched.load_state_dict(stock.state_dict())
    losses = []
    for active in ("second", "default"):
        for wrapped in (stock, patched):
            wrapped.set_adapter(active)
        assert_trains_the_same(stock, patched, inputs)
        losses.append(patched(**inputs).loss)
    assert not torch.isclose(*losses)


@pytest.mark.parametrize("order", ORDERS)
def test_an_adapter_is_saved_and_loaded(device, order, tmp_path):
    inputs = batch(TINY["vocab_size"], device)
    model = base(device)
    stock, patched, _ = pair_of(model, CONFIGS["head and norm saved"], order)
    stock.save_pretrained(tmp_path / "stock")
    patched.save_pretrained(tmp_path / "patched")
    ours, theirs = (
        json.loads((tmp_path / which / "adapter_config.json").read_text()) for which in ("patched", "stock")
    )
    assert ours == theirs
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "patched")
    torch.testing.assert_close(loaded(**inputs).loss, stock(**inputs).loss)
    fresh = copy.deepcopy(model)
    liger.apply(fresh)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "stock", is_trainable=True)
    assert_trains_the_same(stock, loaded.train(), inputs)


class PackedLinear(nn.Linear):
    """As quantised layers are: a Linear by inheritance, whose weight is no matrix of the layer's shape."""

    @classmethod
    def of(cls, linear):
        packed = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        scale = linear.weight.detach().abs().max() / 127
        whole = (linear.weight.detach() / scale).round().to(torch.int8)
        packed.weight = nn.Parameter(whole.view(-1, 1), requires_grad=False)
        packed.register_buffer("scale", scale)
        return packed

    def forward(self, x):
        return F.linear(x, self.weight.view(self.out_features, self.in_features).to(x.dtype) * self.scale)


def quantised(model, of):
    """`model` with every Linear replaced, the head too."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            model.set_submodule(name, of(module))
    return model


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["LoRA on all linear layers", "LoRA on the head", "prompt tuning"])
def test_quantised_weights_below_an_adapter(device, name, order):
    """The head's packed weight is never read as if it were the matrix: the head computes its own logits."""
    inputs = batch(TINY["vocab_size"], device)
    stock, patched, patch = pair_of(quantised(base(device), PackedLinear.of), CONFIGS[name], order)
    assert_trains_the_same(stock, patched, inputs)
    reasons = {d.reason for d in patch.declined if d.name.endswith("lm_head")}
    assert len(reasons) == 1
    assert "not torch.nn.Linear" in reasons.pop()


@pytest.mark.parametrize("name", ["LoRA on all linear layers", "LoRA on the head"])
def test_bitsandbytes_weights_below_an_adapter(device, name):
    bnb = pytest.importorskip("bitsandbytes")

    def of(linear):
        packed = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        packed.load_state_dict({"weight": linear.weight.detach().cpu()})
        return packed.to(device)

    inputs = batch(TINY["vocab_size"], device)
    model = peft.get_peft_model(quantised(base(device), of), copy.deepcopy(CONFIGS[name])).train()
    losses, gradients = [], []
    for patched in (False, True):
        patch = liger.apply(model) if patched else liger.Patch()
        with patch:
            model.zero_grad()
            losses.append(model(**inputs).loss)
            losses[-1].backward()
            gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert any("lm_head" in d.name for d in patch.declined)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


SAVED = {
    "head and norm": ["lm_head", "norm"],
    "whole MLPs and attention": ["mlp", "self_attn"],
    "a whole layer": ["layers.0"],
}


@pytest.mark.parametrize("then", ["trained", "merged", "with a second adapter", "unloaded"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("saved", SAVED)
def test_undo_reaches_the_copies_of_modules_to_save(device, saved, order, then):
    inputs = batch(TINY["vocab_size"], device)
    config = lora("embed_tokens", modules_to_save=SAVED[saved])
    stock, patched, patch = pair_of(base(device), config, order)
    assert_trains_the_same(stock, patched, inputs)
    if then == "with a second adapter":
        for model in (stock, patched):
            torch.manual_seed(4)
            model.add_adapter("second", copy.deepcopy(config))
            model.set_adapter("second")
    if then in ("merged", "unloaded"):
        stock, patched = (getattr(m, "merge_and_unload" if then == "merged" else "unload")() for m in (stock, patched))
    patch.undo()
    assert [type(module) for module in patched.modules()] == [type(module) for module in stock.modules()]
    assert torch.equal(patched(**inputs).loss, stock(**inputs).loss)
    patch.undo()


def test_undo_of_one_patch_leaves_the_copies_of_another(device):
    model = base(device)
    of_norms = liger.apply(model, mlp=False, rope=False, loss=None)
    of_the_rest = liger.apply(model)
    wrapped = peft.get_peft_model(model, lora(Q, modules_to_save=["model.norm", "lm_head"]))

    def copies():
        return {
            name.split(".")[-3]: isinstance(module, Swappable)
            for name, module in wrapped.named_modules()
            if name.endswith(".modules_to_save.default")
        }

    assert copies() == {"norm": True, "lm_head": True}
    of_the_rest.undo()
    assert copies() == {"norm": True, "lm_head": False}
    of_norms.undo()
    assert not any(isinstance(module, Swappable) for module in wrapped.modules())


def test_undo_refuses_where_a_copy_has_become_something_else(device):
    model = base(device)
    patch = liger.apply(model)
    wrapped = peft.get_peft_model(model, lora(Q, modules_to_save=["lm_head"]))
    copied = wrapped.base_model.model.lm_head.modules_to_save["default"]
    copied.__class__ = type("Sharded", (type(copied),), {})
    with pytest.raises(RuntimeError, match="cannot undo: a Linear .* has become .*Sharded"):
        patch.undo()
    assert isinstance(model, Swappable)


@pytest.mark.parametrize("config", IN_FP32.values(), ids=IN_FP32)
def test_one_projection_of_another_dtype_under_autocast(device, config):
    stock, patched = (peft.get_peft_model(base(device), copy.deepcopy(config)) for _ in range(2))
    patched.load_state_dict(stock.state_dict())
    assert not liger.apply(patched).declined
    with torch.autocast(device.type, torch.bfloat16):
        losses = [model(**batch(TINY["vocab_size"], device)).loss for model in (stock, patched)]
    torch.testing.assert_close(*losses, rtol=1e-2, atol=1e-2)
    losses[1].backward()
    assert all(p.grad.isfinite().all() for p in patched.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "config",
    [
        lora(Q, modules_to_save=["final_layernorm"]),
        peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["final_layernorm"]),
    ],
    ids=["saved", "tuned"],
)
def test_a_norm_of_torchs_that_peft_has_wrapped(device, config):
    stock, patched, skipping = (
        peft.get_peft_model(build(PhiForCausalLM, PhiConfig(**TINY), device), copy.deepcopy(config)) for _ in range(3)
    )
    patched.load_state_dict(stock.state_dict())

    def of_the_norm(found):
        return {entry.name.partition("final_layernorm.")[2] for entry in found} - {""}

    copies = of_the_norm(liger.apply(patched).swapped)
    assert len(copies) == 2, "the model's own and PEFT's"
    assert of_the_norm(liger.apply(skipping, skip=["final_layernorm"]).declined) == copies
    assert_trains_the_same(stock, patched, batch(TINY["vocab_size"], device))
