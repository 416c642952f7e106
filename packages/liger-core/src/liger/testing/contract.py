"""The conformance tests that every adapter inherits.

    class TestLlama(AdapterContract):
        adapter = llama

        def config(self):
            return LlamaConfig(**TINY)

Every switch that a Layer of the adapter names (a softcap, an offset) must be on in the config: what is off is not
tested. A test may be overridden only by one marked `@pytest.mark.xfail(reason=...)`.
"""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from liger.adapter import Adapter
from liger.patch import Patch, apply_adapters
from liger.testing.error_rule import assert_as_exact_as
from liger.testing.tiny import batch, build

MODEL_DEPTH = 40
"""How many ops deep a whole model's result lies, for the error rule's floor."""


class AdapterContract:
    """What must hold for one model of an adapter. Subclass it, set `adapter`, and return a tiny config."""

    adapter: ClassVar[Adapter]

    def config(self) -> Any:
        """A tiny config of the model, with `attn_implementation="eager"`."""
        raise TypeError(f"{type(self).__name__} must define config()")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, function in vars(cls).items():
            if name.startswith("test_") and hasattr(AdapterContract, name):
                marks = {mark.name: mark for mark in getattr(function, "pytestmark", [])}
                if not marks.get("xfail") or "reason" not in marks["xfail"].kwargs:
                    raise TypeError(f"{cls.__name__} overrides {name} without pytest.mark.xfail(reason=...)")

    def model(self, device: torch.device, dtype: torch.dtype = torch.float32, cls: str | None = None) -> Any:
        """The language model (or the class of that name in the modeling file), with random weights."""
        assert self.adapter.head is not None or cls is not None
        name = cls or self.adapter.head.model  # type: ignore[union-attr]
        return build(getattr(self.adapter.module(), name), self.config(), device, dtype)

    def apply(self, model: Any, **switches: Any) -> Patch:
        """Apply the adapter under test, whether or not it is the installed one."""
        return apply_adapters(model, [self.adapter], **switches)

    def test_every_target_is_found_and_used(self, device: torch.device) -> None:
        patch = self.apply(self.model(device))
        assert not patch.declined
        used = {s.cls for s in patch.swapped}
        assert set(self.adapter.modules) <= used, f"never used: {set(self.adapter.modules) - used}"
        ropes = {name for s in patch.swapped if s.kind == "rope" for name in s.runs.split(", ")}
        assert {op.__name__ for op in self.adapter.functions.values()} <= ropes
        assert self.adapter.head is None or self.adapter.head.model in used

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_each_module_equals_its_original(self, device: torch.device, path: str, dtype: torch.dtype) -> None:
        """Each swapped module alone, on the inputs that the model gives it; norms round where the original rounds."""
        stock, patched = self.model(device, dtype), self.model(device, dtype)
        exact = copy.deepcopy(stock).double()
        patch = self.apply(patched, loss=None)
        calls = _recorded_calls(stock, [s.name for s in patch.swapped], batch(stock.config.vocab_size, device))
        for name, kind, cls, runs in patch.swapped:
            what = f"{name} ({cls} → {runs})"
            own = _run(stock.get_submodule(name), *calls[name])
            actual = _run(patched.get_submodule(name), *calls[name])
            fp64 = _run(exact.get_submodule(name), *(_cast(part, torch.float64) for part in calls[name]))
            for a, o, e in zip(actual, own, fp64, strict=True):
                assert_as_exact_as(a, o, e, what)
            if kind == "norm" and dtype == torch.bfloat16:
                equal = (actual[0] == own[0]).float().mean().item()
                assert equal > 0.97, f"{what}: only {equal:.0%} of the elements are rounded as the original rounds them"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_loss_and_gradients(self, device: torch.device, path: str, dtype: torch.dtype) -> None:
        stock, patched = self.model(device, dtype), self.model(device, dtype)
        exact = copy.deepcopy(stock).double()
        self.apply(patched)
        inputs = batch(stock.config.vocab_size, device)
        _assert_same_step(patched, stock, exact, inputs)

    def test_num_items_in_batch(self, device: torch.device, path: str) -> None:
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = batch(stock.config.vocab_size, device)
        for items in (7, torch.tensor(7), torch.tensor(7.0, device=device)):
            _assert_same_step(patched, stock, copy.deepcopy(stock).double(), {**inputs, "num_items_in_batch": items})

    def test_shift_labels(self, device: torch.device, path: str) -> None:
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = batch(stock.config.vocab_size, device)
        inputs["shift_labels"] = inputs["labels"].roll(3, dims=-1)
        _assert_same_step(patched, stock, copy.deepcopy(stock).double(), inputs)

    def test_logits_are_there_for_who_reads_them(self, device: torch.device) -> None:
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = batch(stock.config.vocab_size, device)
        for mode in (nn.Module.train, nn.Module.eval):
            mode(stock), mode(patched)
            theirs, ours = stock(**inputs), patched(**inputs)
            assert isinstance(ours.logits, Tensor)
            assert ours.logits.shape == theirs.logits.shape
            assert list(ours) == list(theirs)
            torch.testing.assert_close(ours.logits + 0, theirs.logits, rtol=1e-4, atol=1e-4)
        as_tuple = patched(**inputs, return_dict=False)
        assert len(as_tuple) == len(stock(**inputs, return_dict=False))
        torch.testing.assert_close(as_tuple[1] + 0, theirs.logits, rtol=1e-4, atol=1e-4)

    def test_logits_carry_gradients(self, device: torch.device) -> None:
        """A second loss on `outputs.logits` reaches the weights, as it does in the stock model."""
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = batch(stock.config.vocab_size, device)
        for model in (stock, patched):
            outputs = model(**inputs)
            (outputs.loss + outputs.logits.square().mean()).backward()
        for (name, ours), theirs in zip(patched.named_parameters(), stock.parameters(), strict=True):
            message = f"gradient of {name}: {{}}".format
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=message)

    def test_without_labels_nothing_of_the_loss_differs(self, device: torch.device) -> None:
        model = self.model(device).eval()
        inputs = {"input_ids": batch(model.config.vocab_size, device)["input_ids"]}
        before = model(**inputs).logits
        self.apply(model, rope=False, norm=False, mlp=False)
        assert torch.equal(model(**inputs).logits, before)

    def test_generate(self, device: torch.device) -> None:
        model = self.model(device).eval()
        prompt = batch(model.config.vocab_size, device)["input_ids"]
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        before = model.generate(prompt, **options)
        self.apply(model)
        assert torch.equal(model.generate(prompt, **options), before)

    def test_undo_leaves_no_trace(self, device: torch.device) -> None:
        model = self.model(device)
        inputs = batch(model.config.vocab_size, device)

        def traces() -> list[Any]:
            return [(type(m), sorted(vars(m)), m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]

        before, loss = traces(), model(**inputs).loss
        with self.apply(model):
            model(**inputs).loss.backward()
            assert traces() != before
        assert traces() == before
        assert torch.equal(model(**inputs).loss, loss)

    def test_another_model_is_untouched(self, device: torch.device) -> None:
        other = self.model(device)
        types = [type(m) for m in other.modules()]
        cross_entropy, functions = torch.nn.functional.cross_entropy, dict(vars(self.adapter.module()))
        self.apply(self.model(device))
        assert [type(m) for m in other.modules()] == types
        assert torch.nn.functional.cross_entropy is cross_entropy
        assert vars(self.adapter.module()) == functions

    def test_applying_twice_is_harmless_and_said(self, device: torch.device) -> None:
        model = self.model(device)
        first, second = self.apply(model), self.apply(model)
        assert not second.swapped
        assert len(second.already) == len({s.name for s in first.swapped})
        assert "had been patched before" in str(second)
        second.undo()
        first.undo()
        assert self.apply(model).swapped == first.swapped

    @pytest.mark.parametrize("how", ["deepcopy", "pickle"])
    def test_copies_are_patched_too(self, device: torch.device, how: str) -> None:
        model = self.model(device)
        self.apply(model)
        twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
        inputs = batch(model.config.vocab_size, device)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(**inputs).loss, model(**inputs).loss)

    def test_save_pretrained(self, device: torch.device, tmp_path: Any) -> None:
        model = self.model(device).eval()
        before = model(**batch(model.config.vocab_size, device)).loss
        with self.apply(model):
            model.save_pretrained(tmp_path)
            assert model.config.architectures == [type(model).__name__]
        again = type(model).from_pretrained(tmp_path, attn_implementation="eager").to(device)
        torch.testing.assert_close(again(**batch(model.config.vocab_size, device)).loss, before)

    def test_signature_is_the_models_own(self, device: torch.device) -> None:
        """Trainer drops the columns that `forward` does not name, and looks for labels in it."""
        model = self.model(device)
        before, name = inspect.signature(type(model).forward), str(type(model))
        self.apply(model)
        assert inspect.signature(type(model).forward) == before
        assert str(type(model)) == name

    def test_compiles_as_one_graph(self, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a GPU through inductor and the kernels, elsewhere through AOT autograd and the references."""
        if device.type == "cpu":
            from liger.ops import launch

            monkeypatch.setattr(launch, "enabled", False)
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        exact = copy.deepcopy(stock).double()
        torch._dynamo.reset()
        compiled = torch.compile(patched, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
        _assert_same_step(compiled, stock, exact, batch(stock.config.vocab_size, device))

    def test_gradient_checkpointing_checkpoints(self, device: torch.device) -> None:
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inner = [m for m in patched.modules() if type(m).__name__ in self.adapter.modules]
        calls: list[str] = []
        for module in inner:
            module.register_forward_hook(lambda m, *_: calls.append(type(m).__name__))
        patched(**batch(stock.config.vocab_size, device)).loss.backward()
        once = len(calls)
        patched.gradient_checkpointing_enable()
        patched.zero_grad()
        _assert_same_step(patched, stock, copy.deepcopy(stock).double(), batch(stock.config.vocab_size, device))
        assert len(calls) - once > once, "no module ran again in backward"

    def test_foreign_activation_is_declined(self, device: torch.device) -> None:
        gated = {layer.act for layer in self.adapter.modules.values() if hasattr(layer, "act")}
        config = self.config()
        for attribute in gated:
            setattr(config, attribute, "relu")
        cls = getattr(self.adapter.module(), self.adapter.head.model)  # type: ignore[union-attr]
        stock, patched = build(cls, config, device), build(cls, config, device)
        patch = self.apply(patched)
        assert {d.kind for d in patch.declined} == ({"mlp"} if gated else set())
        _assert_same_step(patched, stock, copy.deepcopy(stock).double(), batch(config.vocab_size, device))

    def test_bare_backbone_and_classifier(self, device: torch.device, path: str) -> None:
        modeling = self.adapter.module()
        family = self.adapter.head.model.removesuffix("ForCausalLM")  # type: ignore[union-attr]
        for name in (f"{family}Model", f"{family}ForSequenceClassification"):
            if not hasattr(modeling, name):
                continue
            stock, patched = self.model(device, cls=name), self.model(device, cls=name)
            assert not self.apply(patched).declined
            ids = {"input_ids": batch(stock.config.vocab_size, device)["input_ids"]}
            if name.endswith("Classification"):
                ids["labels"] = torch.tensor([0, 1], device=device)
            for ours, theirs in zip(patched(**ids).to_tuple(), stock(**ids).to_tuple(), strict=True):
                if isinstance(ours, Tensor):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def _cast(tree: Any, dtype: torch.dtype) -> Any:
    def cast(leaf: Any) -> Any:
        floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.detach().to(dtype) if floating else leaf

    return torch.utils._pytree.tree_map(cast, tree)


def _recorded_calls(model: Any, names: list[str], inputs: dict[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """What each named module is called with in one forward: positional and keyword arguments."""
    calls: dict[str, tuple[Any, Any]] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: calls.setdefault(name, (args, kwargs)) and None, with_kwargs=True
        )
        for name in names
    ]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


def _run(module: nn.Module, args: Any, kwargs: Any) -> list[Tensor]:
    """A module's output, and the gradients of its tensor inputs and parameters under a fixed upstream gradient."""
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    # Only the hidden states get gradients: cos, sin and masks have none in a model.
    args, hidden = (leaf(args[0]), *args[1:]) if args else args, kwargs.get("hidden_states")
    output = module(*args, **({**kwargs, "hidden_states": leaf(hidden)} if hidden is not None else kwargs))
    output = output[0] if isinstance(output, tuple) else output
    upstream = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape).to(output.dtype)
    return [output, *torch.autograd.grad(output, [*leaves, *module.parameters()], upstream)]


def _assert_same_step(patched: Any, stock: Any, exact: Any, inputs: dict[str, Any]) -> None:
    """Loss and every gradient of one step obey the error rule."""
    losses: list[Tensor] = []
    for model in (patched, stock, exact):
        model.zero_grad()
        losses.append(model(**inputs).loss)
        losses[-1].backward()
    dtype = next(stock.parameters()).dtype
    assert_as_exact_as(losses[0], losses[1], losses[2], "loss", depth=MODEL_DEPTH, computed_in=dtype)
    parameters = zip(patched.named_parameters(), stock.parameters(), exact.parameters(), strict=True)
    for (name, ours), theirs, reference in parameters:
        if theirs.grad is None:
            assert ours.grad is None, f"{name} has a gradient that the stock model does not give it"
            continue
        assert_as_exact_as(ours.grad, theirs.grad, reference.grad, f"gradient of {name}", depth=MODEL_DEPTH)
