"""The conformance tests that every adapter inherits.

    class TestLlama(AdapterContract):
        adapter = llama

        def config(self):
            return LlamaConfig(**TINY)

Every switch that a Layer of the adapter names (a softcap, an offset) must be on in the config: what is off is not
tested. A test may be overridden only by one marked `@pytest.mark.xfail(reason=...)`.

Over 300 lines: the contract is one class, so that an adapter inherits all of it.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import re
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from liger.adapter import Adapter
from liger.layers import Stock
from liger.patch import Patch, apply_adapters
from liger.plan import Swapped
from liger.testing.parity import (
    assert_each_as_exact_as,
    assert_same_step,
    cast,
    disturb_numbers,
    in_fp64,
    recorded_calls,
    run,
)
from liger.testing.tiny import batch, build
from liger.testing.unnamed import language_parts, unnamed


@pytest.mark.usefixtures("no_interpreter")
class AdapterContract:
    """What must hold for one model of an adapter. Subclass it, set `adapter`, and return a tiny config.

    Without a GPU only the tests of numbers go through the interpreted kernels, which takes fifty times as long.

    Attributes:
        adapter: the adapter under test.
        model_class: which of its language models, where it has several; the first unless said.
        declines: what of this model the adapter declines, exactly: a kind or a class's name → a regular expression that
            the reason matches.
    """

    adapter: ClassVar[Adapter]
    model_class: ClassVar[str | None] = None
    declines: ClassVar[dict[str, str]] = {}

    def config(self) -> Any:
        """A tiny config of the model, with `attn_implementation="eager"`."""
        raise TypeError(f"{type(self).__name__} must define config()")

    def inputs(self, model: Any) -> dict[str, Any]:
        """What the model is called with: input ids, labels, and whatever else it needs."""
        return batch(model.config.get_text_config().vocab_size, model.device)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, function in vars(cls).items():
            if name.startswith("test_") and hasattr(AdapterContract, name):
                marks = {mark.name: mark for mark in getattr(function, "pytestmark", [])}
                if not marks.get("xfail") or "reason" not in marks["xfail"].kwargs:
                    raise TypeError(f"{cls.__name__} overrides {name} without pytest.mark.xfail(reason=...)")

    @property
    def language_model(self) -> str:
        """The name of the model's class."""
        return self.model_class or self.adapter.heads[0].model

    def model(self, device: torch.device, dtype: torch.dtype = torch.float32, cls: str | None = None) -> Any:
        """The language model (or the class of that name in the modeling file), with random weights."""
        return build(getattr(self.adapter.module(), cls or self.language_model), self.config(), device, dtype)

    def apply(self, model: Any, **switches: Any) -> Patch:
        """Apply the adapter under test, whether or not it is the installed one."""
        return apply_adapters(model, [self.adapter], **switches)

    def unexpected(self, patch: Patch) -> list[Any]:
        """What `patch` declined and `declines` does not foresee."""

        def foreseen(kind: str, cls: str, reason: str) -> bool:
            return any(re.search(self.declines[key], reason) for key in (kind, cls) if key in self.declines)

        return [d for d in patch.declined if not foreseen(d.kind, d.cls, d.reason)]

    def test_every_target_is_found_and_used(self, device: torch.device) -> None:
        patch = self.apply(self.model(device))
        unexpected = {f"{d.cls} ({d.kind}): {d.reason}" for d in self.unexpected(patch)}
        assert not unexpected, f"declined, which `declines` does not foresee: {'; '.join(sorted(unexpected))}"
        met = {name for d in patch.declined for name in (d.kind, d.cls)}
        assert set(self.declines) <= met, f"`declines` foresees what is not declined: {set(self.declines) - met}"
        used = {s.cls for s in patch.swapped} | {d.cls for d in patch.declined}
        assert set(self.adapter.modules) <= used, f"the tiny model holds none: {set(self.adapter.modules) - used}"
        ropes = {name for s in patch.swapped if s.kind == "rope" for name in s.runs.split(", ")}
        if "rope" not in self.declines:
            ops = {op if isinstance(op, str) else op.__name__ for op in self.adapter.functions.values()}
            assert ops <= ropes, f"never used: {ops - ropes}"
        assert self.language_model in used

    def test_nothing_that_has_a_kernel_is_left_out(self, device: torch.device) -> None:
        missing = list(unnamed(self.adapter, self.model(device)))
        assert not missing, f"adapter {self.adapter.key}: " + "; ".join(missing)

    def called(self, model: Any, patch: Patch, calls: dict[str, Any]) -> list[Swapped]:
        """The swapped modules of `model` that are among the calls or see text: a tower may have had no input."""
        text = {module for part in language_parts(model) for module in part.modules()}
        return [s for s in patch.swapped if s.name in calls or model.get_submodule(s.name) in text]

    def method(self, cls: str) -> str:
        """Which method of the class is replaced."""
        layer = self.adapter.modules.get(cls)
        return layer.method if layer else "forward"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_each_module_equals_its_original(self, device: torch.device, path: str, dtype: torch.dtype) -> None:
        """Each swapped module alone, on the inputs that the model gives it; norms round where the original rounds."""
        stock, patched = self.model(device, dtype), self.model(device, dtype)
        exact = in_fp64(stock)
        patch = self.apply(patched, loss=None)
        methods = {s.name: self.method(s.cls) for s in patch.swapped}
        calls = recorded_calls(stock, methods, self.inputs(stock))
        for name, kind, cls, runs in self.called(stock, patch, calls):
            what, method = f"{name} ({cls} → {runs})", methods[name]
            assert name in calls, f"{what}: its {method} is never called"
            own = run(stock.get_submodule(name), method, *calls[name])
            actual = run(patched.get_submodule(name), method, *calls[name])
            fp64 = run(exact.get_submodule(name), method, *(cast(part, torch.float64) for part in calls[name]))
            parts = zip(actual, own, fp64, strict=True)
            assert_each_as_exact_as({f"{what} {i}": triple for i, triple in enumerate(parts)})
            if kind == "norm" and dtype == torch.bfloat16:
                outputs: Any = actual[0], own[0]
                equal = (outputs[0] == outputs[1]).float().mean().item()
                assert equal > 0.97, f"{what}: only {equal:.0%} of the elements are rounded as the original rounds them"

    def test_each_number_of_a_module_counts(self, device: torch.device) -> None:
        """A multiplier that is 1 in the config, or a dropout that is 0, hides nothing that a Layer forgets."""
        stock, patched = self.model(device), self.model(device)
        patch = self.apply(patched, rope=False, loss=None)
        methods = {s.name: self.method(s.cls) for s in patch.swapped}
        calls = recorded_calls(stock, methods, self.inputs(stock))
        for name, _, cls, runs in self.called(stock, patch, calls):
            outputs = []
            for module in (patched.get_submodule(name), stock.get_submodule(name)):
                disturb_numbers(module)
                torch.manual_seed(0)
                outputs.append(run(module, methods[name], *calls[name])[0])
            message = f"{name} ({cls} → {runs}) does not follow a number of its module: {{}}".format
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4, msg=message)

    def test_each_number_of_the_language_model_counts(self, device: torch.device) -> None:
        """A scale of the logits that is 1 in the config hides nothing that the adapter's head forgets."""
        stock, patched = self.model(device), self.model(device)
        read = inspect.unwrap(type(stock).forward).__code__.co_names
        self.apply(patched)
        for model in (stock, patched):
            for owner in (model, model.config, model.config.get_text_config()):
                disturb_numbers(owner, read)
        assert_same_step(patched, stock, in_fp64(stock), self.inputs(stock))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
    def test_loss_and_gradients(self, device: torch.device, path: str, dtype: torch.dtype) -> None:
        stock, patched = self.model(device, dtype), self.model(device, dtype)
        exact = in_fp64(stock)
        self.apply(patched)
        inputs = self.inputs(stock)
        assert_same_step(patched, stock, exact, inputs)

    def test_num_items_in_batch(self, device: torch.device) -> None:
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = self.inputs(stock)
        for items in (7, torch.tensor(7), torch.tensor(7.0, device=device)):
            assert_same_step(patched, stock, in_fp64(stock), {**inputs, "num_items_in_batch": items})

    def test_shift_labels(self, device: torch.device, path: str) -> None:
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = self.inputs(stock)
        inputs["shift_labels"] = inputs["labels"].roll(3, dims=-1)
        assert_same_step(patched, stock, in_fp64(stock), inputs)

    def test_logits_are_there_for_who_reads_them(self, device: torch.device) -> None:
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = self.inputs(stock)
        for mode in (nn.Module.train, nn.Module.eval):
            mode(stock), mode(patched)
            theirs, ours = stock(**inputs), patched(**inputs)
            assert isinstance(ours.logits, Tensor)
            assert ours.logits.shape == theirs.logits.shape
            assert list(ours) == list(theirs)
            torch.testing.assert_close(ours.logits + 0, theirs.logits, rtol=1e-4, atol=1e-4)
        as_tuple, at = patched(**inputs, return_dict=False), list(theirs).index("logits")
        assert len(as_tuple) == len(stock(**inputs, return_dict=False))
        torch.testing.assert_close(as_tuple[at] + 0, theirs.logits, rtol=1e-4, atol=1e-4)

    def test_logits_carry_gradients(self, device: torch.device) -> None:
        """A second loss on `outputs.logits` reaches the weights, as it does in the stock model."""
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        inputs = self.inputs(stock)
        for model in (stock, patched):
            outputs = model(**inputs)
            (outputs.loss + outputs.logits.square().mean()).backward()
        for (name, ours), theirs in zip(patched.named_parameters(), stock.parameters(), strict=True):
            message = f"gradient of {name}: {{}}".format
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5, msg=message)

    def test_without_labels_nothing_of_the_loss_differs(self, device: torch.device) -> None:
        model = self.model(device).eval()
        inputs = {name: value for name, value in self.inputs(model).items() if name != "labels"}
        before = model(**inputs).logits
        self.apply(model, rope=False, norm=False, mlp=False, experts=False)
        assert torch.equal(model(**inputs).logits, before)

    def test_generate(self, device: torch.device) -> None:
        model = self.model(device).eval()
        prompt = self.inputs(model)["input_ids"]
        for config in (model.config, model.config.get_text_config()):
            if getattr(config, "output_router_logits", False):
                config.output_router_logits = False  # transformers 5.17 cannot generate with them
        options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
        before = model.generate(prompt, **options)
        self.apply(model)
        assert torch.equal(model.generate(prompt, **options), before)

    def test_undo_leaves_no_trace(self, device: torch.device) -> None:
        model = self.model(device)
        inputs = self.inputs(model)

        def traces() -> list[Any]:
            return [(type(m), sorted(vars(m)), m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]

        loss = model(**inputs).loss  # before the traces: the first forward leaves some of its own
        before = traces()
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
        inputs = self.inputs(model)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert torch.equal(twin(**inputs).loss, model(**inputs).loss)

    def test_save_pretrained(self, device: torch.device, tmp_path: Any) -> None:
        model = self.model(device).eval()
        before = model(**self.inputs(model)).loss
        with self.apply(model):
            model.save_pretrained(tmp_path)
            assert model.config.architectures == [type(model).__name__]
        again = type(model).from_pretrained(tmp_path, attn_implementation="eager").to(device)
        torch.testing.assert_close(again(**self.inputs(model)).loss, before)

    def test_signature_is_the_models_own(self, device: torch.device) -> None:
        """Trainer drops the columns that `forward` does not name, and looks for labels in it."""
        model = self.model(device)
        before, name = inspect.signature(type(model).forward), str(type(model))
        self.apply(model)
        assert inspect.signature(type(model).forward) == before
        assert str(type(model)) == name

    def test_compiles_as_one_graph(self, device: torch.device) -> None:
        """On a GPU through inductor and the kernels, elsewhere through AOT autograd and the references."""
        stock, patched = self.model(device), self.model(device)
        self.apply(patched)
        exact, inputs = in_fp64(stock), self.inputs(stock)
        for model in (stock, patched):
            model(**inputs)  # transformers installs its recorders of router logits under a lock, which is not traced
        torch._dynamo.reset()
        # With inductor's decompositions: without them torch expects other strides of softplus_backward than it gets.
        backend = "inductor" if device.type == "cuda" else "aot_eager_decomp_partition"
        compile = functools.partial(torch.compile, fullgraph=True, backend=backend)
        try:
            assert_same_step(compile(patched), stock, exact, inputs)
        except torch._dynamo.exc.TorchDynamoException:
            try:
                compile(stock)(**inputs).loss.backward()
            except torch._dynamo.exc.TorchDynamoException as error:
                pytest.xfail(f"nor does the stock model: {error}")
            raise

    def test_gradient_checkpointing_checkpoints(self, device: torch.device) -> None:
        stock, patched = self.model(device), self.model(device)
        calls: list[str] = []
        names = [s.name for s in self.called(patched, self.apply(patched), {}) if s.kind != "loss"]
        for name in names:
            patched.get_submodule(name).register_forward_pre_hook(lambda m, *_: calls.append(type(m).__name__))
        patched(**self.inputs(stock)).loss.backward()
        once = len(calls)
        patched.gradient_checkpointing_enable()
        patched.zero_grad()
        assert_same_step(patched, stock, in_fp64(stock), self.inputs(stock))
        assert len(calls) - once > once or not names, "no module ran again in backward"

    def test_foreign_activation_is_declined(self, device: torch.device) -> None:
        layers = [layer for layer in self.adapter.modules.values() if not isinstance(layer, Stock)]
        gated = [layer for layer in layers if layer.kind in ("mlp", "experts")]
        names = {getattr(layer, "act", None) or "hidden_act" for layer in gated}
        config = self.config()
        for part in filter(None, [config, *(getattr(config, name) for name in config.sub_configs)]):
            for name in names & vars(part).keys():
                setattr(part, name, "sigmoid")  # not relu: its kink makes a rounding of much
        cls = getattr(self.adapter.module(), self.language_model)
        stock, patched = build(cls, config, device), build(cls, config, device)
        patch = self.apply(patched)
        assert {d.kind for d in self.unexpected(patch)} == {layer.kind for layer in gated}
        assert_same_step(patched, stock, in_fp64(stock), self.inputs(stock))

    def test_bare_backbone_and_classifier(self, device: torch.device, path: str) -> None:
        modeling, config = self.adapter.module(), self.config()
        family = re.sub("For(CausalLM|ConditionalGeneration)$", "", self.language_model)
        for name in (f"{family}Model", f"{family}TextModel", f"{family}ForSequenceClassification"):
            if not isinstance(config, getattr(getattr(modeling, name, None), "config_class", ())):
                continue
            stock, patched = self.model(device, cls=name), self.model(device, cls=name)
            assert not self.unexpected(self.apply(patched))
            inputs = {key: value for key, value in self.inputs(stock).items() if key != "labels"}
            if name.endswith("Classification"):
                inputs["labels"] = torch.arange(len(inputs["input_ids"]), device=device) % 2
            for ours, theirs in zip(patched(**inputs).to_tuple(), stock(**inputs).to_tuple(), strict=True):
                if isinstance(ours, Tensor):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
