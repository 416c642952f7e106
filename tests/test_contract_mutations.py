"""The contract is believed because it turns red: adapters broken in one way each, and each is caught."""

from __future__ import annotations

import re
import textwrap

import pytest

MUTANTS = {
    "WrongEps": "replace('LlamaRMSNorm', RMSNorm(eps='wrong_eps'))",
    "ForgottenEps": "replace('LlamaRMSNorm', FixedEps(eps='variance_epsilon'))",
    "WrongOffset": "replace('LlamaRMSNorm', RMSNorm(eps='variance_epsilon', offset=1.0))",
    "WrongCast": "replace('LlamaRMSNorm', RMSNorm(eps='variance_epsilon', cast='gemma'))",
    "WrongAct": "replace('LlamaMLP', GatedMLP(act='model_type'))",
    "MisspeltActFn": "replace('LlamaMLP', GatedMLP(act='hidden_act', act_fn='activation'))",
    "MisspeltClass": "replace('LlamaRMSNrom', RMSNorm(eps='variance_epsilon'))",
    "WrongRotary": "dataclasses.replace(llama, functions={'apply_rotary_pos_emb': unrotated})",
    "OtherSignature": "dataclasses.replace(llama, functions={'apply_rotary_pos_emb': other_signature})",
    "WrongSoftcap": "dataclasses.replace(llama, head=CausalLM('LlamaForCausalLM', softcap='initializer_range'))",
    "WrongHead": "dataclasses.replace(llama, head=CausalLM('LlamaForCausalLM', head='model'))",
    "WrongModel": "dataclasses.replace(llama, head=CausalLM('LlamaForSequenceClassification'))",
    "WrongFile": "dataclasses.replace(llama, modeling='transformers.models.mistral.modeling_mistral')",
    "NormLeftOut": "dataclasses.replace(llama, modules={'LlamaMLP': llama.modules['LlamaMLP']})",
    "RotaryLeftOut": "dataclasses.replace(llama, functions={})",
    "TorchNormLeftOut": "diffllama_without('nn.RMSNorm')",
    "ForgottenScale": "granite()",
    "InvertedScale": "granite(logit_scale='config.logits_scaling')",
    "NotBroken": "llama",
    "NotBrokenScale": "granite(logit_divisor='config.logits_scaling')",
}
SOUND = {"NotBroken", "NotBrokenScale"}

SUITE = """
import dataclasses
from transformers import DiffLlamaConfig, GraniteConfig, LlamaConfig
from liger.adapter import Adapter
from liger.causal_lm import CausalLM
from liger.layers import GatedMLP, RMSNorm
from liger.ops import rms_norm, rotary
from liger.testing import TINY, AdapterContract
from liger_llama import diffllama, llama


class FixedEps(RMSNorm):
    def forward(self, module, x):
        return rms_norm(x, module.weight, 1e-6)


def replace(name, layer):
    return dataclasses.replace(llama, modules={**llama.modules, name: layer})


def unrotated(q, k, cos, sin, unsqueeze_dim=1):
    return q * cos.unsqueeze(unsqueeze_dim), k * cos.unsqueeze(unsqueeze_dim)


def other_signature(q, k, cos, sin, position_ids=None, unsqueeze_dim=1):
    return q, k


def diffllama_without(name):
    modules = {key: value for key, value in diffllama.modules.items() if key != name}
    return dataclasses.replace(diffllama, modules=modules)


def granite(**scale):
    return Adapter(
        modeling="transformers.models.granite.modeling_granite",
        modules={"GraniteRMSNorm": RMSNorm(eps="variance_epsilon"), "GraniteMLP": GatedMLP(act="hidden_act")},
        functions={"apply_rotary_pos_emb": rotary},
        head=CausalLM("GraniteForCausalLM", **scale),
    )


class Suite(AdapterContract):
    def config(self):
        config = {"diffllama": DiffLlamaConfig, "granite": GraniteConfig}.get(self.adapter.key, LlamaConfig)
        return config(**TINY, wrong_eps=1e-1)

"""


def test_every_mutant_turns_a_test_red_and_the_sound_adapter_none(pytester):
    classes = [f"class Test{name}(Suite):\n    adapter = {value}\n" for name, value in MUTANTS.items()]
    pytester.makepyfile(SUITE + "\n\n".join(textwrap.dedent(c) for c in classes))
    result = pytester.runpytest_subprocess(
        "-p", "liger.testing.plugin", "-q", "--tb=no", "-rfE",
        "-k", "found_and_used or left_out or its_original or each_number or loss_and_gradients or logits_are_there",
    )  # fmt: skip
    red = set(re.findall(r"(?:FAILED|ERROR) .*::Test(\w+)::", result.stdout.str()))
    assert red == set(MUTANTS) - SOUND, f"stayed green: {set(MUTANTS) - SOUND - red}; turned red: {SOUND & red}"


def test_overriding_a_test_needs_a_reason(pytester):
    pytester.makepyfile(
        """
        import pytest
        from liger.testing import AdapterContract

        def test_refused():
            with pytest.raises(TypeError, match="Mine overrides test_generate without"):
                class Mine(AdapterContract):
                    def test_generate(self): pass

        def test_allowed():
            class Mine(AdapterContract):
                @pytest.mark.xfail(reason="this model has no generate")
                def test_generate(self): pass
        """
    )
    pytester.runpytest("-p", "liger.testing.plugin").assert_outcomes(passed=2)


@pytest.mark.parametrize("outcome", ["failed", "xfailed"])
def test_a_model_must_compile_where_the_stock_model_does(pytester, outcome):
    """Transformers has models that do not: they are reported, and pass."""
    pytester.makepyfile(
        f"""
        import dataclasses, torch
        from transformers import LlamaConfig
        from liger.ops import rotary
        from liger.testing import TINY, AdapterContract
        from liger_llama import llama

        def breaking(q, k, cos, sin, unsqueeze_dim=1):
            torch._dynamo.graph_break()
            return rotary(q, k, cos, sin, unsqueeze_dim)

        def stop(*_):
            torch._dynamo.graph_break()

        class TestBreaking(AdapterContract):
            adapter = dataclasses.replace(llama, functions={{"apply_rotary_pos_emb": breaking}})

            def config(self):
                return LlamaConfig(**TINY)

            def model(self, *args, **kwargs):
                model = super().model(*args, **kwargs)
                if {outcome == "xfailed"}:
                    model.model.register_forward_pre_hook(stop)
                return model
        """
    )
    result = pytester.runpytest_subprocess("-p", "liger.testing.plugin", "-k", "compiles_as_one_graph")
    counts = result.parseoutcomes()
    assert {name for name in ("passed", "failed", "xfailed") if name in counts} == {outcome}
