"""TRL's trainers on a patched model: they bring a fused head, ours steps aside, and they log what they log on stock.

Over 300 lines: the trainers share their set-up and the comparison of their logs.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaForSequenceClassification
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

import liger
from liger import layers
from liger.lazy_logits import LazyLogits
from liger.subclass import Swappable
from liger.testing import TINY
from liger.testing.plugin import HAS_GPU
from liger.testing.tiny import batch, build
from tiny_trainer import OPTIONS, tiny_llama

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
pytestmark = [
    pytest.mark.usefixtures("no_interpreter"),
    pytest.mark.filterwarnings("ignore:::trl"),
    pytest.mark.filterwarnings("ignore:::transformers"),
]

TURNS = (
    "{% for turn in messages %}{% if turn.role == 'user' %}<s> {{ turn.content }} {% else %}"
    "{% generation %}{{ turn.content }} </s> {% endgeneration %}{% endif %}{% endfor %}"
)
# TRL's KL is a difference of log-probabilities, which a GPU's products round otherwise.
RELATIVE, ABSOLUTE = 1e-3 if HAS_GPU else 1e-4, 1e-5
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(TINY["vocab_size"] - 4))]
LORA = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "down_proj"])


@pytest.fixture
def ran(monkeypatch):
    """The names of the layers' ops that were called."""
    names, own = set(), layers.rebuildable

    def recording(op, *args, **kwargs):
        names.add(op.__name__)
        return own(op, *args, **kwargs)

    monkeypatch.setattr(layers, "rebuildable", recording)
    return names


def tokenizer():
    words = {word: number for number, word in enumerate(WORDS)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=TURNS, **special)


def rows(kind):
    generator = torch.Generator().manual_seed(0)

    def say(count):
        return " ".join(WORDS[i] for i in torch.randint(4, len(WORDS), (count,), generator=generator))

    pairs = [{"prompt": say(4) + " ", "chosen": say(3 + i % 4), "rejected": say(2 + i % 3)} for i in range(12)]
    if kind in ("DPO", "Reward"):
        return datasets.Dataset.from_list(pairs)
    completions = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    if kind == "KTO":
        completions = [{**row, "label": i % 2 == 0} for i, row in enumerate(completions)]
    if kind == "GRPO":
        completions = [{"prompt": pair["prompt"]} for pair in pairs]
    if kind == "conversations":
        roles = {"user": "prompt", "assistant": "completion"}
        completions = [
            {"messages": [{"role": role, "content": row[part]} for role, part in roles.items()]} for row in completions
        ]
    return datasets.Dataset.from_list(completions)


def reward(completions, **_):
    return [float(sum(map(ord, completion)) % 5) for completion in completions]


OWN_OPTIONS = {"GRPO": {"num_generations": 2, "max_completion_length": 5, "beta": 0.1}}


def trainer(kind, model, tmp_path, config=None, **options):
    """TRL's trainer of that kind; what is in `options` and no field of its config is an argument of its own."""
    config_class, trainer_class = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    own = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    arguments = config_class(
        output_dir=str(tmp_path),
        **{**OPTIONS, "max_steps": 2, "per_device_train_batch_size": 4, "bf16": False},
        **{**OWN_OPTIONS.get(kind, {}), **options},
    )
    if kind == "GRPO":
        own["reward_funcs"] = reward
    data = rows("conversations" if options.get("assistant_only_loss") else kind)
    torch.manual_seed(3)  # for the adapter that the trainer makes
    return trainer_class(
        model,
        args=arguments,
        train_dataset=data,
        eval_dataset=None if kind == "GRPO" else data,
        processing_class=tokenizer(),
        peft_config=config,
        **own,
    )


def logged(run):
    """Everything that training and evaluation log, but what depends on the clock."""
    run.train()
    if run.eval_dataset is not None:
        run.evaluate()
    return [
        {
            name: value
            for name, value in entry.items()
            if "runtime" not in name and "second" not in name and "time" not in name
        }
        for entry in run.state.log_history
    ]


def assert_same_log(ours, theirs):
    assert len(theirs) > 2
    assert [entry.keys() for entry in ours] == [entry.keys() for entry in theirs]
    for our_entry, their_entry in zip(ours, theirs, strict=True):
        ours_now, theirs_now = dict(our_entry), dict(their_entry)
        for prefix in ("", "eval_"):
            # Of two equal rewards a GPU's rounding decides which is ahead.
            if HAS_GPU and abs(theirs_now.get(f"{prefix}rewards/margins", 1.0)) < ABSOLUTE:
                ours_now.pop(f"{prefix}rewards/accuracies", None)
                theirs_now.pop(f"{prefix}rewards/accuracies", None)
        assert ours_now == pytest.approx(theirs_now, rel=RELATIVE, abs=ABSOLUTE, nan_ok=True)
    assert any(entry.get("grad_norm", 0) > 1e-3 for entry in theirs)


@pytest.fixture(scope="module")
def tiny(device, tmp_path_factory):
    """Makes a tiny LLaMA that says where it lies: the trainers load their reference model from there."""
    path = tmp_path_factory.mktemp("tiny")
    model = tiny_llama(device)
    model.save_pretrained(path)
    model.config._name_or_path = str(path)
    return functools.partial(copy.deepcopy, model)


def wrapped(model):
    torch.manual_seed(3)
    return peft.get_peft_model(model, LORA)


ORDERS = {
    "apply, trainer": (None, True),
    "trainer, apply": (None, False),
    "apply, trainer with peft_config": ("peft_config", True),
    "trainer with peft_config, apply": ("peft_config", False),
    "apply, get_peft_model, trainer": ("inside", True),
    "get_peft_model, apply, trainer": ("around", True),
    "get_peft_model, trainer, apply": ("around", False),
}


@pytest.fixture(scope="module")
def stock_log(tiny, tmp_path_factory):
    """What an unpatched run logs, and its model."""

    @functools.cache
    def log(kind, adapter):
        model = wrapped(tiny()) if adapter in ("inside", "around") else tiny()
        config = LORA if adapter == "peft_config" else None
        run = trainer(kind, model, tmp_path_factory.mktemp("stock"), config)
        return logged(run), run.model

    return log


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["SFT", "DPO", "KTO", "GRPO"])
def test_the_log_is_that_of_an_unpatched_run(device, tmp_path, tiny, stock_log, ran, kind, order):
    adapter, apply_first = ORDERS[order]
    theirs, stock = stock_log(kind, "around" if adapter == "inside" else adapter)
    assert not ran
    model = tiny()
    if adapter == "around":
        model = wrapped(model)
    patch = liger.apply(model) if apply_first else None
    if adapter == "inside":
        model = wrapped(model)
    run = trainer(kind, model, tmp_path, LORA if adapter == "peft_config" else None)
    if patch is None:
        patch = liger.apply(run.model)
        (reason,) = {d.reason for d in patch.declined}
        assert reason.startswith("its forward was replaced on the instance by trl.")
        assert {d.kind for d in patch.declined} == {"loss"}
    assert {s.kind for s in patch.swapped} >= {"norm", "mlp", "rope"}
    assert_same_log(logged(run), theirs)
    assert ran == {"rms_norm", "swiglu"}

    inputs = batch(TINY["vocab_size"], device)
    outputs = run.model(**inputs)  # without `fused_lm_head=True` TRL's forward calls the one that it found
    assert isinstance(outputs.logits, LazyLogits) == apply_first
    torch.testing.assert_close(outputs.loss, stock(**inputs).loss, rtol=1e-4, atol=1e-4)
    patch.undo()
    assert not any(isinstance(module, Swappable) for module in run.model.modules())
    outputs = run.model(**inputs)
    assert type(outputs.logits) is torch.Tensor
    torch.testing.assert_close(outputs.loss, stock(**inputs).loss, rtol=1e-4, atol=1e-4)


def test_the_loss_asked_for_by_name_is_refused_behind_trl_s_forward(tiny, tmp_path):
    run = trainer("SFT", tiny(), tmp_path)
    with pytest.raises(ValueError, match="loss='linear' was asked for .*forward was replaced on the instance"):
        liger.apply(run.model, loss="linear")


@pytest.mark.parametrize("kind", ["DPO", "KTO", "GRPO"])
def test_the_reference_model_can_be_patched_too(tiny, tmp_path, stock_log, kind):
    run = trainer(kind, tiny(), tmp_path)
    for model in (run.model, run.ref_model):
        assert {s.kind for s in liger.apply(model).swapped} == {"norm", "mlp", "rope"}
    assert_same_log(logged(run), stock_log(kind, None)[0])


def mean_of_logits(outputs, labels, num_items_in_batch=None):
    return outputs.logits.float().mean(-1)[labels != -100].mean()


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_checkpointing": False},
        {"gradient_checkpointing_kwargs": {"selective": True}},
        {"label_smoothing_factor": 0.1},
        {"loss_type": "dft"},
        {"packing": True, "max_length": 24},
        {"completion_only_loss": False},
        {"assistant_only_loss": True},
        pytest.param({"activation_offloading": True}, marks=pytest.mark.gpu),  # TRL's needs an accelerator
        {"compute_loss_func": mean_of_logits},
        {
            "peft_config": peft.LoraConfig(
                task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]
            )
        },
    ],
    ids=lambda options: ", ".join(options),
)
def test_options_of_the_sft_trainer(tiny, tmp_path, ran, options):
    logs = []
    config = options.pop("peft_config", None)
    for patched in (False, True):
        model = tiny()
        if patched:
            liger.apply(model)
        logs.append(logged(trainer("SFT", model, tmp_path, config, **copy.deepcopy(options))))
    assert_same_log(logs[1], logs[0])
    assert ran == {"rms_norm", "swiglu"}


@pytest.mark.parametrize("apply_first", [True, False])
def test_grpo_with_a_head_in_fp32(device, tiny, tmp_path, apply_first):
    """TRL puts a forward of its own on the head too, before or after ours has become the head's class."""
    stock = trainer("GRPO", tiny(), tmp_path, cast_lm_head_to_fp32=True)
    theirs = logged(stock)
    model = tiny()
    if apply_first:
        liger.apply(model)
    patched = trainer("GRPO", model, tmp_path, cast_lm_head_to_fp32=True)
    if not apply_first:
        liger.apply(patched.model)
    assert_same_log(logged(patched), theirs)
    inputs = batch(TINY["vocab_size"], device)
    torch.testing.assert_close(patched.model(**inputs).loss, stock.model(**inputs).loss, rtol=1e-4, atol=1e-4)


def test_a_reward_model(device, tmp_path, ran):
    logs = []
    for patched in (False, True):
        model = build(LlamaForSequenceClassification, LlamaConfig(**TINY, num_labels=1, use_cache=False), device)
        if patched:
            liger.apply(model)
        logs.append(logged(trainer("Reward", model, tmp_path)))
    assert_same_log(logs[1], logs[0])
    assert ran == {"rms_norm", "swiglu"}


def test_a_mixture_of_experts_and_its_auxiliary_loss(device, tmp_path, ran):
    logs = []
    for patched in (False, True):
        config = MixtralConfig(**TINY, num_local_experts=4, num_experts_per_tok=2, use_cache=False)
        model = build(MixtralForCausalLM, config, device)
        if patched:
            assert "experts" in {s.kind for s in liger.apply(model).swapped}
        logs.append(logged(trainer("SFT", model, tmp_path, router_aux_loss_coef=0.02)))
    assert_same_log(logs[1], logs[0])
    assert all(entry["aux_loss"] > 0 for entry in logs[0] if "loss" in entry)
