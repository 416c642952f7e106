"""Every code block of every page is run, or says why not; every command and every link is a real one."""

from __future__ import annotations

import ast
import doctest
import importlib
import re

import pytest
import torch

import liger.losses
import liger.ops
from code_blocks import ALL, PAGES, ROOT
from liger.testing import TINY
from liger.testing.tiny import batch, build
from shell_commands import complaint

CORE = "packages/liger-core/README.md"
MODELS = {"gemma": "Gemma", "mistral": "Mistral", "phi": "Phi3", "qwen": "Qwen3"}
"""What `model` is on the page of a family; on every other page a Llama."""

OURS = [block for block in ALL if not (block.not_run or block.run_by)]
PYTHON = [block for block in OURS if block.language == "python"]
RUNS = [(page, "reference") for page in dict.fromkeys(block.page for block in PYTHON)]
RUNS += [(page, "kernel") for page, _ in RUNS if page.startswith("docs/how/")]
"""The derivations hold for the kernels, and for what users have without a GPU."""


def names(page, device):
    """What a page's blocks may use without making it: a tiny model, and two batches."""
    family = re.search(r"packages/liger-(\w+)/", page)
    name = MODELS.get(family[1], "Llama") if family else "Llama"
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{name}Config")(**TINY)
    model = build(getattr(transformers, f"{name}ForCausalLM"), config, device)
    return {"model": model, "batches": [batch(config.vocab_size, device)] * 2}


def run(page, namespace):
    """Run the page's blocks in one namespace; errors show the page's own lines."""
    for block in PYTHON:
        if block.page == page:
            exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), namespace)
            yield block


@pytest.mark.parametrize(("page", "path"), RUNS, indirect=["path"])
def test_the_python_of_a_page_runs(page, path, device):
    where = device if path == "kernel" else torch.device("cpu")
    namespace = names(page, where)
    with where:  # the derivations say of no tensor where it is
        assert list(run(page, namespace))


@pytest.mark.parametrize("path", ["reference"], indirect=True)
def test_each_loss_has_an_example_that_trains(path):
    namespace = names(CORE, torch.device("cpu"))
    seen = set()
    for block in run(CORE, namespace):
        loss = namespace.pop("loss", None)
        if loss is None:
            continue
        seen |= set(re.findall(r"loss = (\w+)", block.text))
        gradients = torch.autograd.grad(loss, (namespace["hidden"], namespace["weight"]), retain_graph=True)
        assert loss.isfinite(), block
        assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients), block
    assert seen == {name for name in liger.losses.__all__ if name.endswith("_loss")} | {"linear_distillation"}


@pytest.mark.parametrize("path", ["reference"], indirect=True)
def test_the_examples_in_docstrings_show_what_comes_out(path):
    tried = 0
    for module in (liger.losses, liger.ops):
        for name in module.__all__:
            for example in doctest.DocTestFinder(recurse=False).find(getattr(module, name), name):
                shown = doctest.DocTestRunner(verbose=False)
                example.globs.update(vars(module), torch=torch)
                assert shown.run(example).failed == 0, name
                tried += bool(example.examples)
    assert tried


@pytest.mark.parametrize("block", [block for block in OURS if block.language == "sh"], ids=str)
def test_its_commands_are_real(block):
    wrong = {command: said for command in block.commands() if (said := complaint(command))}
    assert not wrong


@pytest.mark.parametrize(
    "command",
    [
        "hatch run tset",
        "hatch -e flor run test",
        "hatch run bench --op rms_nrom",
        "hatch run release liger-llama minor --dryrun",
        "python -m liger explian llama",
        "python -m liger bench --tinny",
        "python -m bechmarks",
        "python -m pip install liger-lama",
        "torchrun --nproc-per-node 2 examples/fsdp2.py --stepz 20",
        "cd packages/liger-lama",
        "make test",
    ],
)
def test_a_command_that_is_not_real_is_found(command):
    assert complaint(command)


@pytest.mark.parametrize("block", [block for block in ALL if block not in OURS], ids=str)
def test_another_test_runs_it_or_it_says_why_none_does(block):
    if block.not_run:
        pytest.skip(block.not_run)
    assert block.page in (ROOT / block.run_by).read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_says_what_each_block_is(page):
    languages = {str(block): block.language for block in ALL if block.page == page}
    unknown = {where: said for where, said in languages.items() if said not in ("python", "sh", "text")}
    assert not unknown, "python, sh, or text for what is no code"


@pytest.mark.parametrize("page", [*PAGES, ".pre-commit-config.yaml"])
def test_what_a_page_names_in_passing_is_real(page):
    text = (ROOT / page).read_text("utf-8")
    commands = set(re.findall(r"hatch (?:-e \w+ )?run [\w:-]+", text))
    assert not {command: said for command in commands if (said := complaint(command))}
    links = set(re.findall(r"\]\((?!https?:)([^)#]+)", text))
    assert not {link for link in links if not (ROOT / page).parent.joinpath(link).exists()}


def test_readme_has_the_two_commands():
    shown = [command for block in ALL if block.page == "README.md" for command in block.commands()]
    assert {"hatch run demo", "hatch run test"} <= set(shown)


def strings():
    """The strings in the packages, adjoining ones as one; of an f-string, what stands between its values."""
    for path in ROOT.glob("packages/*/src/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_troubleshooting_quotes_what_the_code_says():
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    terms = re.findall(r"^\*\*`(.+)`\*\*", page, re.M) + re.findall(r"^`(.+)`\n: ", page, re.M)
    quotes = [quote for term in terms for quote in term.split("`, `")]
    assert len(quotes) > 10
    said = [text.strip() for text in strings() if len(text) > 10 and " " in text.strip()]
    for quote in quotes:
        pieces = [piece.strip() for piece in quote.split("…") if " " in piece.strip()]
        is_said = any(piece in text or text in piece for piece in pieces for text in said)
        assert is_said or hasattr(liger, quote), f"the code says nothing like {quote!r}"


def test_each_op_is_derived_on_a_page():
    pages = "\n".join(path.read_text("utf-8") for path in ROOT.glob("docs/how/*.md"))
    shown = set(re.findall(r"automodule:: (liger\.ops\.\w+)", pages))
    assert not {name for name in liger.ops.__all__ if getattr(liger.ops, name).__module__ not in shown}


def test_every_picture_of_the_benchmarks_is_shown():
    shown = (ROOT / "docs/benchmarks.md").read_text("utf-8")
    missing = [path.name for path in ROOT.glob("benchmarks/results/*.png") if path.name not in shown]
    assert not missing
