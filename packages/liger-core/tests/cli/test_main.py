"""The command line: what runs without a command, `--json` before and after one, and what an error looks like."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys

import pytest


def test_python_m_liger_is_the_report(llama, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["liger", "--json"])
    monkeypatch.delitem(sys.modules, "liger.__main__")
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("liger", run_name="__main__")
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out)["command"] == "report"


@pytest.mark.parametrize("arguments", [("--json", "explain", "nothing"), ("explain", "nothing", "--json")])
def test_an_error_goes_to_stderr_and_into_the_document(run, arguments):
    status, out, err = run(*arguments)
    assert status == 2
    assert err.startswith("python -m liger: 'nothing' is no config.json")
    found = json.loads(out)
    assert found.keys() == {"schema", "command", "error"}
    assert (found["schema"], found["command"]) == (1, "explain")
    assert err == f"python -m liger: {found['error']}\n"


def test_an_error_without_json_leaves_stdout_empty(run):
    status, out, _ = run("explain", "nothing")
    assert (status, out) == (2, "")


@pytest.mark.parametrize("arguments", [("explain",), ("benhc",), ("bench", "--huge")])
def test_a_wrong_command_line_exits_with_2(run, arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert stopped.value.code == 2
    assert "usage: python -m liger" in capsys.readouterr().err


def test_help_says_what_each_exit_status_means(run, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    assert "exit status:" in said
    assert all(f"\n  {status}  " in said for status in (0, 1, 2))


def test_importing_liger_imports_no_command():
    program = "import liger, sys; print([name for name in sys.modules if name.startswith('liger.')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "liger.patch" in done.stdout
    assert "liger.cli" not in done.stdout
