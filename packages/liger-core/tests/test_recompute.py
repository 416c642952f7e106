"""recompute: the same loss and gradients from fewer kept bytes, and nothing where it cannot be had safely."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, Phi3Config, PhiConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM
from transformers.models.phi.modeling_phi import PhiForCausalLM
from transformers.models.phi3.modeling_phi3 import Phi3ForCausalLM

from adapted_models import LLAMA, MIXTRAL, llama, mixtral_config
from liger import recompute
from liger.adapter import Adapter
from liger.layers import FusedGatedMLP, LayerNorm, RMSNorm
from liger.ops import launch, rms_norm
from liger.patch import apply_adapters
from liger.testing import TINY
from liger.testing.tiny import batch, build

pytestmark = pytest.mark.usefixtures("no_interpreter")

PHI = Adapter(modeling="transformers.models.phi.modeling_phi", modules={"nn.LayerNorm": LayerNorm()})
PHI3 = Adapter(
    modeling="transformers.models.phi3.modeling_phi3",
    modules={"Phi3RMSNorm": RMSNorm(eps="variance_epsilon"), "Phi3MLP": FusedGatedMLP(act="hidden_act")},
)
WITHOUT_HEAD_DIM = {name: value for name, value in TINY.items() if name != "head_dim"}
FAMILIES = {
    "llama": (LLAMA, LlamaForCausalLM, lambda: LlamaConfig(**TINY)),
    "mixtral": (MIXTRAL, MixtralForCausalLM, lambda: mixtral_config(experts_implementation="grouped_mm")),
    "phi": (PHI, PhiForCausalLM, lambda: PhiConfig(**WITHOUT_HEAD_DIM)),
    "phi3": (PHI3, Phi3ForCausalLM, lambda: Phi3Config(**WITHOUT_HEAD_DIM)),
}
TOKENS, H, WIDTH, LAYERS = 18, TINY["hidden_size"], TINY["intermediate_size"], TINY["num_hidden_layers"]


def apply(model, adapter=LLAMA, **switches):
    return apply_adapters(model, [adapter], **switches)


def pair(device, family="llama", dtype=torch.float32):
    """The same model with the option on and off."""
    adapter, cls, config = FAMILIES[family]
    models = [build(cls, config(), device, dtype) for _ in range(2)]
    for model, on in zip(models, (True, False), strict=True):
        apply(model, adapter, recompute=on)
    return models


def step(model, call=None, **more):
    """The loss and every gradient of one step."""
    model.zero_grad()
    inputs = batch(99, model.device)
    loss = call(**inputs) if call else model(**inputs, **more).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def assert_equal(ours, theirs):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one is other is None or torch.equal(one, other)


class Allocated(TorchDispatchMode):
    """Which storages that were allocated under it are alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        before = {leaf.untyped_storage()._cdata for leaf in tensors((args, kwargs or {}))}
        for leaf in tensors(result):
            storage = leaf.untyped_storage()
            if storage._cdata not in before:
                self.storages[storage._cdata] = torch.multiprocessing.reductions.StorageWeakRef(storage), len(storage)
        return result

    def alive(self):
        return sum(size for weak, size in self.storages.values() if not weak.expired())


def tensors(tree):
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if type(leaf) in (torch.Tensor, nn.Parameter)]


def kept(model, forward=None):
    """The bytes that are alive between forward and backward, and did not exist before."""
    inputs = batch(99, model.device)
    with Allocated() as allocated:
        loss = forward(inputs) if forward else model(**inputs, use_cache=False).loss
    gc.collect()
    bytes_kept = allocated.alive()
    loss.backward()
    del loss
    model.zero_grad()
    gc.collect()
    assert allocated.alive() == 0, "something outlives backward"
    return bytes_kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_the_same_bit_for_bit(device, path, family, dtype):
    on, off = pair(device, family, dtype)
    assert_equal(step(on), step(off))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_norm_outputs_and_products_are_not_kept(device, path, dtype):
    """To the byte: two norm outputs and one product a layer, less the copies of two weights."""
    on, off = pair(device, dtype=dtype)
    saved = LAYERS * (TOKENS * (2 * H + WIDTH) - 2 * H) * dtype.itemsize
    # The references keep fp32 copies of bf16 inputs: those inputs are not kept, so nothing can be rebuilt from them.
    assert kept(off) - kept(on) == (saved if path == "kernel" or dtype == torch.float32 else 0)


@pytest.mark.parametrize(("family", "width"), [("phi3", 2 * H + WIDTH), ("phi", H), ("mixtral", 2 * H + 2 * WIDTH)])
def test_other_layers(device, path, family, width):
    """A fused gate and up; LayerNorm; experts, each token's product twice, and a norm whose output is a view's base."""
    on, off = pair(device, family)
    saved = kept(off) - kept(on)
    weights = {"phi3": 2 * H, "phi": 2 * H, "mixtral": 2 * H}[family]
    assert saved == LAYERS * (TOKENS * width - weights) * 4


def test_each_output_is_rebuilt_once_a_backward(device, monkeypatch):
    on, off = pair(device)
    calls = []
    compute = recompute._Recipe._compute
    monkeypatch.setattr(recompute._Recipe, "_compute", lambda self: (calls.append(self), compute(self))[1])
    loss = on(**batch(99, on.device)).loss
    loss.backward(retain_graph=True)
    assert len(calls) == len(set(calls)) == 3 * LAYERS
    assert all(recipe.rebuilt is None for recipe in calls), "a rebuilt tensor outlives its consumers"
    loss.backward()
    assert len(calls) == 2 * len(set(calls)) == 6 * LAYERS
    theirs = step(off)
    assert_equal([p.grad / 2 for p in on.parameters()], theirs[1:])


def test_a_part_of_backward_then_all_of_it(device):
    on, off = pair(device)
    results = []
    for model in (on, off):
        loss = model(**batch(99, device)).loss
        weight = model.model.layers[0].self_attn.k_proj.weight
        results.append([*torch.autograd.grad(loss, [weight], retain_graph=True), *torch.autograd.grad(loss, [weight])])
    assert_equal(*results)


def test_double_backward_is_as_without(device, monkeypatch):
    """On the references, which can be differentiated twice."""
    monkeypatch.setattr(launch, "enabled", False)
    results = []
    for model in pair(device):
        weights = [layer.mlp.gate_proj.weight for layer in model.model.layers]
        logits = model(input_ids=batch(99, device)["input_ids"]).logits
        first = torch.autograd.grad(logits.square().mean(), weights, create_graph=True)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(model.parameters())[1:-1]))
    assert_equal(*results)


@pytest.mark.parametrize("order", ["lora first", "patch first"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_lora(device, order, dropout):
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    results, sizes = [], []
    for on in (True, False):
        model = llama(device)
        if order == "patch first":
            apply(model, recompute=on)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
        model = peft.get_peft_model(model, config)
        if order == "lora first":
            apply(model, recompute=on)
        torch.manual_seed(1)
        results.append(step(model))
        sizes.append(kept(model))
    assert_equal(*results)
    # The first norm's input needs no gradient: nothing is kept of it. With dropout LoRA keeps what that returns.
    norms = 2 * LAYERS - 1
    assert sizes[1] - sizes[0] == (0 if dropout else 4 * (TOKENS * (norms * H + LAYERS * WIDTH) - norms * H))


def test_autocast_rebuilds_the_cast_copies(device, path):
    on, off = pair(device)

    def forward(model):
        def call(inputs):
            with torch.autocast(device.type, torch.bfloat16):
                return model(**inputs, use_cache=False).loss

        return call

    assert_equal(*(step(model, lambda model=model, **inputs: forward(model)(inputs)) for model in (on, off)))
    # q, k, v, gate and up keep a bf16 copy each, of a norm's output in fp32, and down_proj the product in bf16 (which
    # the reference computes from fp32 copies).
    product = WIDTH if path == "kernel" else 0
    expected = LAYERS * (TOKENS * (5 * H + product) * 2 - 2 * H * 4)
    assert kept(off, forward(off)) - kept(on, forward(on)) == expected


@pytest.mark.parametrize("tracked", [True, False])
def test_an_output_changed_in_place_is_kept(device, tracked):
    def double(module, args, output):
        with torch.set_grad_enabled(tracked):
            output.mul_(2)

    on, off = pair(device)
    for model in (on, off):
        model.model.layers[0].input_layernorm.register_forward_hook(double)
    assert_equal(step(on), step(off))
    saved = LAYERS * (2 * H + WIDTH) * TOKENS - 2 * LAYERS * H
    assert kept(off) - kept(on) < saved * 4, "the changed output was not kept"


def test_an_output_changed_before_it_is_cast_is_kept(device):
    def double(module, args, output):
        with torch.no_grad():
            output.mul_(2)

    on, off = pair(device)
    for model in (on, off):
        model.model.layers[1].post_attention_layernorm.register_forward_hook(double)

    def call(model):
        def forward(**inputs):
            with torch.autocast(device.type, torch.bfloat16):
                return model(**inputs).loss

        return forward

    assert_equal(step(on, call(on)), step(off, call(off)))


def test_a_changed_input_is_an_error_as_it_is_without(device):
    for model in pair(device):
        inputs = []
        model.model.layers[1].input_layernorm.register_forward_pre_hook(
            lambda _, args, inputs=inputs: inputs.append(args[0])
        )
        loss = model(**batch(99, device)).loss
        with torch.no_grad():
            inputs[0].zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_changed_weight_is_an_error_as_it_is_without(device):
    for model in pair(device):
        loss = model(**batch(99, device)).loss
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_is_kept_itself_and_not_an_alias_of_its_data():
    """ZeRO-3 gives a parameter other data between forward and backward."""
    region = recompute._Region()
    weight = nn.Parameter(torch.ones(3))
    assert region.pack(weight).tensor is weight
    result = weight.exp()
    assert region.pack(result).tensor is not result


def test_a_norm_reads_its_weight_as_it_was(device):
    """FSDP and ZeRO-3 may have emptied it by then."""
    on, off = pair(device)
    loss = on(**batch(99, device)).loss
    weight = on.model.layers[0].input_layernorm.weight
    before, weight.data = weight.data, torch.empty(0, device=device)
    k_proj = on.model.layers[0].self_attn.k_proj.weight
    (ours,) = torch.autograd.grad(loss, [k_proj])
    weight.data = before
    theirs = torch.autograd.grad(off(**batch(99, device)).loss, [off.model.layers[0].self_attn.k_proj.weight])
    assert_equal([ours], theirs)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(device, reentrant):
    on, off = pair(device)
    for model in (on, off):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_equal(step(on), step(off))
    assert kept(on) <= kept(off)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model(device, reentrant):
    on, off = pair(device)
    results = []
    for model in (on, off):
        embeds = model.get_input_embeddings()(batch(99, device)["input_ids"])

        def call(embeds, model=model):
            return model(inputs_embeds=embeds, labels=batch(99, device)["labels"], use_cache=False).loss

        results.append(
            step(model, lambda embeds=embeds, call=call, **_: checkpoint(call, embeds, use_reentrant=reentrant))
        )
    assert_equal(*results)


def test_hooks_of_the_user_see_all_that_they_saw(device):
    """torch lets the inner hooks hide the outer ones; so no region is opened inside them."""
    seen = []
    for model in pair(device):
        shapes = []
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=shapes: (s.append(t.shape), t.detach())[1], lambda t: t
        )
        with hooks:
            loss = model(**batch(99, device)).loss
        loss.backward()
        seen.append((shapes, [p.grad for p in model.parameters()]))
    assert seen[0][0] == seen[1][0]
    assert_equal(seen[0][1], seen[1][1])


def test_torch_func(device, monkeypatch):
    """Its transforms allow no hooks, and the kernels' Functions no transform."""
    monkeypatch.setattr(launch, "enabled", False)
    results = []
    for model in pair(device):
        parameters = {name: p.detach() for name, p in model.model.named_parameters()}

        def loss(parameters, model=model):
            ids = batch(99, device)["input_ids"]
            return torch.func.functional_call(model.model, parameters, (ids,)).last_hidden_state.square().mean()

        results.append(list(torch.func.grad(loss)(parameters).values()))
    assert_equal(*results)


@pytest.mark.parametrize("what", ["model", "layers"])
def test_compiled(device, what):
    """The whole model as one graph: no region. Its layers, inside a region of the model's: they keep what they keep."""
    torch._dynamo.reset()
    options = {"fullgraph": True, "backend": "aot_eager_decomp_partition" if device.type == "cpu" else "inductor"}
    on, off = pair(device)
    expected = step(off)
    if what == "model":
        compiled = torch.compile(on, **options)
        actual = step(on, lambda **inputs: compiled(**inputs).loss)
    else:
        for layer in on.model.layers:
            layer.compile(**options)
        actual = step(on)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_report_and_undo(device):
    model = llama(device)
    before = [(type(m), sorted(vars(m))) for m in model.modules()]
    with apply(model, recompute=True) as patch:
        assert [(s.name, s.kind, s.cls) for s in patch.swapped if s.kind == "recompute"] == [
            ("model", "recompute", "LlamaModel")
        ]
        assert "recompute  1 × LlamaModel → the outputs of its norms" in str(patch)
        model(**batch(99, device)).loss.backward()
    assert [(type(m), sorted(vars(m))) for m in model.modules()] == before
    assert all(s.kind != "recompute" for s in apply(model).swapped), "it is off unless asked for"


def test_added_to_a_model_that_is_patched(device):
    model, reference = llama(device), llama(device)
    before = [type(m) for m in model.modules()]
    first = apply(model)
    apply(reference)
    size = kept(model)
    second = apply(model, recompute=True)
    assert [s.kind for s in second.swapped] == ["recompute"]
    assert kept(model) < size
    assert_equal(step(model), step(reference))
    assert apply(model, recompute=True).swapped == []
    first.undo()
    second.undo()
    assert [type(m) for m in model.modules()] == before


def test_asked_for_where_it_cannot_be_had(device):
    model = llama(device)
    with pytest.raises(ValueError, match="recompute=True was asked for and can be applied nowhere"):
        apply(model, norm=False, mlp=False, recompute=True)
    model.model.forward = model.model.forward
    with pytest.raises(ValueError, match="recompute=True .*its forward was replaced on the instance"):
        apply(model, recompute=True)
    assert type(model.model) is LlamaModel


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies(device, how):
    on, off = pair(device)
    twin = copy.deepcopy(on) if how == "deepcopy" else pickle.loads(pickle.dumps(on))
    assert type(twin.model) is type(on.model) is not LlamaModel
    assert_equal(step(twin), step(off))
    assert all(p.grad is None for p in on.parameters())
    assert kept(twin) == kept(on)


def test_several_models(device):
    """Two forwards before two backwards; one model inside the other's forward."""
    one, two = (pair(device)[0] for _ in range(2))
    off = pair(device)[1]
    losses = [model(**batch(99, device)).loss for model in (one, two, one)]
    for loss in reversed(losses):
        loss.backward()
    expected = step(off)[1:]
    assert_equal([p.grad / 2 for p in one.parameters()], expected)
    assert_equal([p.grad for p in two.parameters()], expected)
    inner = []
    handle = one.model.layers[1].register_forward_pre_hook(lambda *_: inner.append(two(**batch(99, device)).loss))
    assert_equal(step(one)[1:], expected)
    handle.remove()
    two.zero_grad()
    inner[0].backward()
    assert_equal([p.grad for p in two.parameters()], expected)


def test_an_exception_leaves_nothing_behind(device):
    model = pair(device)[0]

    def fail(*_):
        raise RuntimeError("on purpose")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(**batch(99, device))
    assert recompute._state.region is None
    assert torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    handle.remove()
    assert_equal(step(model), step(pair(device)[1]))


def test_without_gradients_no_region_is_opened(device, monkeypatch):
    model = pair(device)[0]
    monkeypatch.setattr(recompute, "_Region", lambda: pytest.fail("a region was opened"))
    with torch.no_grad():
        model(**batch(99, device))
    with torch.inference_mode():
        model(**batch(99, device))


def test_a_frozen_model_keeps_nothing(device):
    on, off = pair(device)
    for model in (on, off):
        model.requires_grad_(False)
        model.lm_head.weight.requires_grad_()
    assert kept(on) == kept(off)


def in_region(model):
    """A module's call inside a region."""
    return recompute.forward_in_region(lambda self, *args: self(*args)).__get__(model)


def test_a_recipe_keeps_nothing_alive_that_autograd_lets_go(device):
    """A norm of a part of a wide tensor copies it: the copy is kept, and the wide tensor must not be."""

    class Part(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.out = nn.Linear(8, 64, device=device), nn.Linear(8, 8, device=device)
            self.weight = nn.Parameter(torch.ones(8, device=device))

        def forward(self, x):
            part = self.wide(x)[..., 8:16]
            return self.out(recompute.rebuildable(rms_norm, part, self.weight, 1e-6))

    module, x = Part(), torch.randn(5, 8, device=device)
    sizes = []
    for call in (module, in_region(module)):
        with Allocated() as allocated:
            y = call(x)
        sizes.append(allocated.alive())
        del y
    assert sizes[1] <= sizes[0]


def test_a_freed_output_is_never_taken_for_a_new_tensor(device):
    """The output dies unused; others of its shape come to lie where it lay, in memory and among Python's objects."""

    class Reusing(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((8,), 3.0, device=device))

        def forward(self, x):
            for _ in range(50):
                recompute.rebuildable(rms_norm, x, self.weight, 1e-6)
                x = (x * 1.01).sin() * (x + 1)
            return x

    module, results = Reusing(), []
    for call in (module, in_region(module)):
        x = torch.linspace(-1, 1, 40, device=device).view(5, 8).requires_grad_()
        results.append(torch.autograd.grad(call(x * 1).sum(), [x]))
    assert_equal(*results)


def test_views_and_dead_names(device):
    """Parts of an output, transposed, after its own name is gone."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.linspace(1, 2, 8, device=device))
            self.one, self.two = nn.Linear(4, 3, device=device), nn.Linear(5, 3, device=device)

        def forward(self, x):
            y = recompute.rebuildable(rms_norm, x, self.weight, 1e-6)
            left, turned = y[:, 4:], y.t()
            del y
            return self.one(left).sum() + self.two(turned).sum() + left.t().exp().sum() + (turned * turned).sum()

    module, results = Views(), []
    for call in (module, in_region(module)):
        x = torch.linspace(-1, 1, 40, device=device).view(5, 8).requires_grad_()
        results.append(torch.autograd.grad(call(x * 1), [x, *module.parameters()]))
    assert_equal(*results)
