"""A model of 100 million parameters of each family, trained on real text: stock, patched, and stock from other seeds.

    python -m benchmarks.convergence --seconds 170 --json benchmarks/results/h100-convergence.json

All runs see the same batches in the same order. Stock and patched start from the same weights, the runs after them from
others, and how far those are apart is the yardstick: a difference that is smaller than what another seed makes changes
nothing for whoever trains. Weights are fp32 and the operations bf16 by autocast, as a trainer with
`bf16=True` has it. In weights of bf16 an update of less than a 256th of the weight is lost, and the curves would show
that rounding and not the kernels. The families run at once, each in a process of its own. The exit status is 1 when one
is not within, or not finished.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import TINY
from benchmarks.processes import Report, reports
from benchmarks.results_file import device_name, earlier, versions, write

STEPS, BATCH, SEQUENCE, RATE, WARM_UP = 300, 8, 512, 6e-4, 30
LAST_STEPS = 20
"""The steps at the end over which a final loss is the mean."""
OTHER_SEEDS = 3
WITHIN = "within the spread"

_SIZES = {
    "vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 7,
    "num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 256},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 256},
    "qwen3": {"head_dim": 64},
    "phi3": {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}


@dataclass(frozen=True)
class Job:
    """One family's runs."""

    family: str
    device: torch.device
    deadline: float
    tiny: bool
    other_seeds: int = OTHER_SEEDS


def text_batches(count: int, batch: int, sequence: int, vocabulary: int, device: torch.device) -> list[Tensor]:
    """Stretches of the text that Python ships with, in the words of the demo's tokenizer."""
    sys.path.append(str(Path(__file__).parent.parent / "examples"))  # a folder of scripts, not a package
    from demo_text import Tokenizer, batches, text

    source = text()
    return batches(Tokenizer(source, vocabulary).encode(source), count, batch, sequence, device)


def _model(job: Job, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {**_SIZES, **FAMILIES[job.family], **(TINY if job.tiny else {})}
    config = AutoConfig.for_model(job.family, **sizes, tie_word_embeddings=True, use_cache=False)
    attention = "eager" if job.family == "gemma2" else "sdpa"  # which has no softcap
    torch.manual_seed(seed)
    with job.device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention).train()


def curve(model: Any, data: list[Tensor], deadline: float) -> list[float]:
    """The loss at each step, up to the deadline."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
    losses = []
    for tokens in data:
        if time.monotonic() > deadline:
            break
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.detach())
    return [round(loss, 5) for loss in torch.stack(losses).tolist()] if losses else []


def train(job: Job, report: Callable[[Report], None]) -> None:
    """One process's work: the runs of a family, one after the other."""
    import liger

    steps, batch, sequence = (8, 2, 32) if job.tiny else (STEPS, BATCH, SEQUENCE)
    data = text_batches(steps, batch, sequence, (TINY if job.tiny else _SIZES)["vocab_size"], job.device)
    seeds = {"stock": 0, "patched": 0, **{f"seed {seed}": seed for seed in range(1, job.other_seeds + 1)}}
    for name, seed in seeds.items():
        model = _model(job, seed)
        if name == "patched":
            liger.apply(model)
        began = time.monotonic()
        losses = curve(model, data, job.deadline)
        seconds = round(time.monotonic() - began, 1)
        report({"run": name, "losses": losses, "seconds": seconds, "parameters": model.num_parameters()})
        if len(losses) < steps:
            return


def judged(family: dict[str, Any]) -> dict[str, Any]:
    """The final losses; how far the patched run is from stock at the end and over the whole curve, and other seeds.

    `final_spread` is that of all stock runs. Two numbers may happen to be near, so the end alone says little: `curve_…`
    is the root mean square over all steps, of the seed that is nearest to stock. Nothing where a run was cut short.
    """
    runs = {name: run["losses"] for name, run in family["runs"].items()}
    others = [name for name in runs if name not in ("stock", "patched")]
    if len({len(losses) for losses in runs.values()}) != 1 or not others:
        return {}
    final = {name: sum(losses[-LAST_STEPS:]) / len(losses[-LAST_STEPS:]) for name, losses in runs.items()}
    stock = [final["stock"], *(final[name] for name in others)]
    return {
        "final": final,
        "final_difference": abs(final["patched"] - final["stock"]),
        "final_spread": max(stock) - min(stock),
        "curve_difference": _distance(runs["stock"], runs["patched"]),
        "curve_spread": min(_distance(runs["stock"], runs[name]) for name in others),
    }


def _distance(curve: list[float], other: list[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(curve, other, strict=True)) / len(curve))


def within(judgement: dict[str, Any]) -> bool:
    """Whether the patched run is as near to stock as other seeds are, at the end and over the whole curve."""
    return (
        judgement["final_difference"] <= judgement["final_spread"]
        and judgement["curve_difference"] <= judgement["curve_spread"]
    )


def verdict(entry: dict[str, Any]) -> str:
    """What is said of a family at the end: WITHIN, or why not."""
    if "final" not in entry:
        return "not finished"
    return WITHIN if within(entry) else "NOT within the spread"


def main() -> None:
    """Train the families that were asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__.partition("\n")[0])
    parser.add_argument("--family", action="append", choices=list(FAMILIES), help="may be repeated; all without it")
    parser.add_argument("--other-seeds", type=int, default=OTHER_SEEDS, help="stock runs beside the first")
    parser.add_argument("--at-once", type=int, default=len(FAMILIES), help="processes that share the GPU")
    parser.add_argument("--seconds", type=float, default=170, help="runs are cut short after these")
    parser.add_argument("--json", type=Path, help="write the curves to this file, after each run")
    parser.add_argument("--add", action="store_true", help="keep the file's other families; the same machine's only")
    parser.add_argument("--tiny", action="store_true", help="sizes that prove the program runs, and nothing else")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began = time.monotonic()
    device, families = torch.device(options.device), options.family or list(FAMILIES)
    results: dict[str, Any] = {"device": device_name(device), "versions": versions(), "convergence": {}}
    if options.add and options.json:
        results["convergence"] = earlier(options.json, results["device"]).get("convergence", {})
    results["convergence"].update({family: {"runs": {}} for family in families})
    deadline = began + options.seconds
    jobs = [Job(family, device, deadline, options.tiny, options.other_seeds) for family in families]
    # A run notices by itself that the time is up; a little later it would be killed.
    for job, report in reports(train, iter(jobs), deadline + 15, at_once=options.at_once):
        entry = results["convergence"][job.family]
        if "failed" in report:
            entry.update(report)
        else:
            entry["runs"][report.pop("run")] = report
            entry.update(judged(entry))
        shown = {key: value for key, value in {**entry, **report}.items() if key not in ("runs", "losses")}
        print(f"{time.monotonic() - began:4.0f} s  {job.family:<8} {shown}", flush=True)
        if options.json:
            write(options.json, results)
    judgements = {family: verdict(results["convergence"][family]) for family in families}
    print(*(f"{family:<8} {found}" for family, found in judgements.items()), sep="\n")
    sys.exit(any(found != WITHIN for found in judgements.values()))


if __name__ == "__main__":
    main()
