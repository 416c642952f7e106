"""Each package as its users get it: wheels made of the sdists, and an environment that holds nothing else of ours."""

from __future__ import annotations

import email
import json
import re
import subprocess
import zipfile

import pytest
from packaging.requirements import Requirement

from alone import PACKAGES, build, empty_environment, install

NAMES = [package.name for package in PACKAGES]
FAMILIES = [name for name in NAMES if name != "liger-core"]
each_package = pytest.mark.parametrize("name", NAMES)

PROBE = """
import importlib.metadata, json, sys
import torch
import liger

assert not [name for name in sys.modules if name.startswith(("pytest", "liger.testing", "transformers"))]
found = {}
for key, installed in liger.adapters().items():
    adapter = installed.load()
    cls = getattr(adapter.module(), adapter.heads[0].model)
    config = cls.config_class()
    if vars(config).get("head_dim", 0) is None:  # Ministral's, which its own attention cannot do without
        config.head_dim = 64
    with torch.device("meta"):
        model = cls(config)
    found[key] = [installed.distribution, sorted({swapped.kind for swapped in liger.apply(model).swapped})]
names = {d.name for d in importlib.metadata.distributions() if d.name.startswith("liger-")}
print(json.dumps([sorted(names), found]))
"""


@pytest.fixture(scope="session")
def dist(tmp_path_factory):
    """(the folder of the wheels, the unpacked sdist by package)."""
    folder = tmp_path_factory.mktemp("dist")
    return folder, {package.name: build(package, folder) for package in PACKAGES}


def wheel(dist, name):
    (path,) = dist[0].glob(f"{name.replace('-', '_')}-*.whl")
    with zipfile.ZipFile(path) as opened:
        (metadata,) = (entry for entry in opened.namelist() if entry.endswith(".dist-info/METADATA"))
        return opened.namelist(), email.message_from_bytes(opened.read(metadata))


@each_package
def test_a_wheel_holds_one_import_name_and_all_its_files(dist, name):
    entries, _ = wheel(dist, name)
    (package,) = (path for path in PACKAGES if path.name == name)
    top = {entry.split("/")[0] for entry in entries}
    imported = "liger" if name == "liger-core" else name.replace("-", "_")
    assert {entry for entry in top if not entry.endswith(".dist-info")} == {imported}
    source = {str(p.relative_to(package / "src")) for p in package.glob("src/**/*") if p.suffix in (".py", ".typed")}
    assert {entry for entry in entries if entry.startswith(f"{imported}/")} == source
    assert any(entry.endswith(".dist-info/licenses/LICENSE") for entry in entries)


@each_package
def test_an_sdist_holds_its_tests_and_papers(dist, name):
    unpacked = dist[1][name]
    (package,) = (path for path in PACKAGES if path.name == name)
    tests = {path.relative_to(package) for path in package.glob("tests/**/*.py")}
    assert {path.relative_to(unpacked) for path in unpacked.glob("tests/**/*.py")} == tests
    for paper in ("README.md", "CHANGELOG.md", "LICENSE", "pyproject.toml"):
        assert (unpacked / paper).read_text("utf-8") == (package / paper).read_text("utf-8")


@each_package
def test_metadata_is_complete(dist, name):
    _, said = wheel(dist, name)
    assert said["Summary"]
    assert said["License-Expression"] == "Apache-2.0"
    assert said["Author"]
    assert said["Keywords"]
    assert said["Requires-Python"] == ">=3.10"
    assert f"# {name}\n" in said.get_payload()
    urls = dict(url.split(", ") for url in said.get_all("Project-URL"))
    assert urls.keys() == {"Homepage", "Source", "Changelog", "Issues"}
    assert urls["Changelog"].endswith(f"/packages/{name}/CHANGELOG.md")
    classifiers = said.get_all("Classifier")
    assert {"Typing :: Typed", "Operating System :: OS Independent"} <= set(classifiers)
    assert "testing" in said.get_all("Provides-Extra")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_requires_core_and_transformers_in_ranges_and_nothing_else(dist, name):
    required = [Requirement(line) for line in wheel(dist, name)[1].get_all("Requires-Dist")]
    plain = {requirement.name: requirement.specifier for requirement in required if requirement.marker is None}
    assert plain.keys() == {"liger-core", "transformers"}
    for specifier in plain.values():
        assert {part.operator for part in specifier} == {">=", "<"}
    extra = {requirement.name for requirement in required if requirement.marker is not None}
    assert extra == {"liger-core"}, "liger-core[testing] of the extra"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_installed_alone_is_found_and_applied(dist, name, tmp_path):
    python = empty_environment(tmp_path)
    install(python, dist[0], name)
    done = subprocess.run([str(python), "-c", PROBE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, found = json.loads(done.stdout)
    assert names == sorted(["liger-core", name])
    (package,) = (path for path in PACKAGES if path.name == name)
    assert found.keys() == set(
        re.findall(r"^(\w+) = \"liger_\w+:\w+\"$", (package / "pyproject.toml").read_text(), re.M)
    )
    for key, (distribution, kinds) in found.items():
        assert distribution == name
        assert {"norm", "loss"} <= set(kinds), key


def test_a_familys_tests_run_from_its_sdist(dist, tmp_path):
    """Those of Phi, which are quick; `hatch run alone <package>` runs all of any."""
    python = empty_environment(tmp_path)
    install(python, dist[0], "liger-phi")
    tests = [str(python), "-m", "pytest", "-q", "tests/test_phi3.py", "-k", "not kernel and not compiles"]
    done = subprocess.run(tests, cwd=dist[1]["liger-phi"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.search(r"(\d+) passed", done.stdout)
    assert counts
    assert int(counts[1]) > 20


def test_without_core_a_family_is_not_installed(dist, tmp_path):
    """The environment holds no core of its own: what the other tests find there is what pip installed."""
    python = empty_environment(tmp_path)
    alone = subprocess.run(
        [str(python), "-c", "import liger"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert "No module named 'liger'" in alone.stderr
    (tmp_path / "wheels").mkdir()
    (path,) = dist[0].glob("liger_llama-*.whl")
    (tmp_path / "wheels" / path.name).symlink_to(path)
    with pytest.raises(subprocess.CalledProcessError):
        install(python, tmp_path / "wheels", "liger-llama")
