"""The nightly run names the adapter that broke, and where."""

from __future__ import annotations

import transformers

from clone import Clone


def test_an_adapter_that_broke_is_named_with_its_tests(tmp_path):
    clone = Clone(tmp_path)
    clone.keep("liger-core", "liger-llama", "liger-phi")
    adapters = clone.folder / "packages/liger-phi/src/liger_phi/__init__.py"
    sound = adapters.read_text("utf-8")
    assert '"Phi3MLP"' in sound
    adapters.write_text(sound.replace('"Phi3MLP"', '"Phi3GatedMLP"'))
    status, said = clone.run("nightly.py", "--transformers", "installed", "-k", "found_and_used")
    lines = said.splitlines()
    assert status == 1, said
    assert f"the families with transformers {transformers.__version__}" in lines
    (at,) = (n for n, line in enumerate(lines) if line.startswith("adapter phi3 on transformers"))
    assert "test_every_target_is_found_and_used: AttributeError: adapter phi3 names Phi3GatedMLP" in lines[at + 1]
    assert not [line for line in lines if line.startswith(("adapter phi on", "adapter phimoe"))]
    assert "FAILED liger_phi-0.1.0/tests/test_phi3.py::TestPhi3::test_every_target_is_found_and_used" in said
