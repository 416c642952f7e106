"""What the packages say of themselves, and what README says of the repository."""

from __future__ import annotations

import re
import sys
from importlib.metadata import entry_points, metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import liger

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)


def toml(path):
    return tomllib.loads(path.read_text("utf-8"))


def source(package):
    (folder,) = (path.parent for path in package.glob("src/*/__about__.py"))
    return folder


@each_package
def test_installed_version_is_the_sources(package):
    stated = re.search(r'^__version__ = "(.+)"$', (source(package) / "__about__.py").read_text(), re.M)
    assert stated, "__about__.py states no version"
    assert version(package.name) == stated[1]


@each_package
def test_changelog_begins_with_the_present_version(package):
    top = re.search(r"^## (\S+?),? ", (package / "CHANGELOG.md").read_text(), re.M)
    assert top, "CHANGELOG.md has no heading of a version"
    assert Version(top[1]) == Version(version(package.name))


@each_package
def test_a_package_carries_licence_and_types(package):
    assert (package / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert metadata(package.name)["License-Expression"] == "Apache-2.0"
    assert (source(package) / "py.typed").exists()


@each_package
def test_siblings_are_required_by_ranges_that_hold(package):
    names = {path.name for path in PACKAGES}
    siblings = [r for r in map(Requirement, requires(package.name) or []) if r.name in names and not r.marker]
    assert siblings or package.name == "liger-core"
    for sibling in siblings:
        operators = {specifier.operator for specifier in sibling.specifier}
        assert operators == {">=", "<"}, f"{sibling}: a range, so that the two are released separately"
        assert sibling.specifier.contains(version(sibling.name), prereleases=True), f"{sibling} is not what is here"


@each_package
def test_entry_points_are_installed_and_load(package):
    stated = toml(package / "pyproject.toml")["project"].get("entry-points", {}).get("liger.adapters", {})
    assert bool(stated) != (package.name == "liger-core")
    installed = {e.name: e for e in entry_points(group="liger.adapters") if e.dist and e.dist.name == package.name}
    assert {name: entry.value for name, entry in installed.items()} == stated
    for name, entry in installed.items():
        adapter = entry.load()
        assert isinstance(adapter, liger.Adapter)
        assert adapter.modeling.startswith(f"transformers.models.{name}."), "the key is transformers' name of the model"


@each_package
def test_a_packages_tests_run_alone(package):
    tables = (toml(folder / "pyproject.toml")["tool"]["pytest"]["ini_options"] for folder in (package, ROOT))
    own, root = (set(table["addopts"].split()) for table in tables)
    assert "liger.testing.plugin" in own
    assert own <= root


def test_readmes_commands_exist():
    scripts = toml(ROOT / "hatch.toml")["envs"]["default"]["scripts"]
    for page in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md"):
        used = set(re.findall(r"hatch run (\w+)", (ROOT / page).read_text("utf-8")))
        assert used <= set(scripts), f"{page}: {used - set(scripts)}"
    assert {"demo", "test"} <= set(re.findall(r"^hatch run (\w+)$", (ROOT / "README.md").read_text("utf-8"), re.M))


def listed_in_readme():
    tree = (ROOT / "README.md").read_text("utf-8").partition("## The source")[2].split("```")[1]
    folders: list[tuple[int, str]] = []
    for line in filter(None, tree.splitlines()):
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        folders = [folder for folder in folders if folder[0] < depth]
        path = "".join([folder[1] for folder in folders]) + name
        if name.endswith("/"):
            folders.append((depth, name))
        yield path


def test_readmes_tree_is_the_repositorys():
    listed = set(listed_in_readme())
    missing = {path for path in listed if not (ROOT / path).exists()}
    assert not missing, f"README lists what does not exist: {missing}"
    patterns = ("packages/*/src/**/*.py", "benchmarks/**/*.py", "examples/**/*.py")
    files = {str(path.relative_to(ROOT).as_posix()) for pattern in patterns for path in ROOT.glob(pattern)}
    assert not files - listed, f"README's tree lacks {files - listed}"


def test_readmes_links_lead_somewhere():
    for page in (
        "README.md",
        "CONTRIBUTING.md",
        "benchmarks/README.md",
        *(f"packages/{p.name}/README.md" for p in PACKAGES),
    ):
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / page).read_text("utf-8")):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"
