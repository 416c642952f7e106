"""What is asked of `apply`: which modules a pattern of `skip` means, and what counts as asked for by name."""

from __future__ import annotations

import re

import pytest

from liger.switches import Switches, matches


@pytest.mark.parametrize(
    ("pattern", "name", "meant"),
    [
        ("model.layers.0.*", "model.layers.0.mlp", True),
        ("model.layers.0.*", "model.layers.10.mlp", False),
        ("model.layers.0.*", "base_model.model.model.layers.0.self_attn", True),
        ("model.layers.0.*", "submodel.layers.0.mlp", False),
        ("mlp", "model.layers.3.mlp", True),
        ("mlp", "model.layers.3.mlp.gate_proj", False),
        ("MLP", "model.layers.3.mlp", False),
        ("*norm", "model.layers.3.input_layernorm", True),
        ("model.layers.[01].*", "model.layers.1.mlp", True),
        ("*", "", True),
        ("lm_head", "base_model.model.lm_head.original_module", True),
        ("lm_head", "base_model.model.lm_head.modules_to_save.default", True),
        ("layers.0.mlp", "layers.0.modules_to_save.default.mlp", True),
        ("modules_to_save", "base_model.model.lm_head.modules_to_save.default", False),
    ],
)
def test_a_pattern_means_a_name_or_its_end_after_a_dot(pattern, name, meant):
    assert matches(name, pattern) == meant


def test_patterns_may_come_from_what_can_be_read_once():
    switches = Switches(skip=(name for name in ["norm", "mlp"]))
    for _ in range(2):
        assert switches.skipped("model.layers.0.mlp") == "skipped by 'mlp'"
    assert switches.skipped("lm_head") is None


@pytest.mark.parametrize("skip", ["mlp", None, [0], b"mlp"], ids=str)
def test_what_is_no_list_of_strings_is_refused(skip):
    """The characters of one string would be the patterns."""
    with pytest.raises(TypeError, match=re.escape(f"skip must be a list of patterns, not {skip!r}")):
        Switches(skip=skip)


def test_only_what_was_passed_is_asked_for_by_name():
    assert Switches().asked_by_name() == {}
    passed = Switches(norm=True, loss="linear", mlp=False, skip=["norm"])
    assert passed.asked_by_name() == {"norm": True, "loss": "linear"}
