"""LoRA from the first step to the merged model that is loaded again, stock and patched; on 4-bit weights too."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import liger
from liger.lazy_logits import LazyLogits
from liger.testing import TINY
from liger.testing.tiny import batch, build

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.usefixtures("no_interpreter"),
    pytest.mark.filterwarnings("ignore:::peft"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),
]
STEPS = 4


@pytest.fixture
def saved(tmp_path):
    """The folder of a model in bf16, as most are published."""
    build(LlamaForCausalLM, LlamaConfig(**TINY), torch.device("cpu"), torch.bfloat16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(folder, device, dtype):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device})


def quantised(folder, device):
    """As QLoRA has it: the layers in 4 bits, head and norms in fp32, its layers checkpointed."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    from transformers import BitsAndBytesConfig

    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        bnb_4bit_use_double_quant=True,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=four_bits, dtype=torch.bfloat16, device_map={"": device}
    )
    return peft.prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})


def losses_of_training(model, inputs, autocast):
    optimizer, losses = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3), []
    for _ in range(STEPS):
        with torch.autocast(inputs["labels"].device.type, dtype=torch.bfloat16, enabled=autocast):
            outputs = model(**inputs)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.detach())
    return torch.stack(losses), outputs


@pytest.mark.parametrize("order", ["apply, then PEFT", "PEFT, then apply"])
@pytest.mark.parametrize("bits", [32, 4])
def test_trained_saved_merged_and_loaded_as_stock(saved, device, tmp_path, bits, order):
    inputs = batch(TINY["vocab_size"], device, rows=4)
    untrained = load(saved, device, torch.float32)(**inputs).loss
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    curves, merged_losses = [], []
    for patched in (False, True):
        model = quantised(saved, device) if bits == 4 else load(saved, device, torch.float32)
        if patched and order == "apply, then PEFT":
            liger.apply(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, copy.deepcopy(config)).train()
        if patched and order == "PEFT, then apply":
            liger.apply(model)
        curve, outputs = losses_of_training(model, inputs, autocast=bits == 4)
        assert isinstance(outputs.logits, LazyLogits) == patched
        curves.append(curve)

        folder = tmp_path / f"patched-{patched}"
        model.save_pretrained(folder / "adapter")
        if bits == 4:  # the adapter is merged into the weights as they were before they were quantised
            model = peft.PeftModel.from_pretrained(load(saved, device, torch.float32), folder / "adapter")
        else:
            in_place = model.eval()(**inputs).loss
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        loaded = load(folder / "merged", device, torch.float32)
        assert type(loaded) is LlamaForCausalLM
        merged_losses.append(loaded(**inputs).loss)
        torch.testing.assert_close(merged_losses[-1], merged(**inputs).loss)
        if bits == 32:
            torch.testing.assert_close(merged_losses[-1], in_place, rtol=1e-4, atol=0)
    tolerance = {"rtol": 3e-3 if bits == 4 else 1e-4, "atol": 0}
    torch.testing.assert_close(curves[1], curves[0], **tolerance)
    torch.testing.assert_close(merged_losses[1], merged_losses[0], **tolerance)
    assert curves[0][-1] < curves[0][0] - 0.1
    assert merged_losses[0] < untrained - 0.1
