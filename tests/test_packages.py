"""What the packages say of themselves, and what README says of the repository."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from importlib.metadata import entry_points, metadata, requires, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import liger
from liger import discover
from shell_commands import environments

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))
FAMILIES = [package for package in PACKAGES if package.name != "liger-core"]
each_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
each_family = pytest.mark.parametrize("package", FAMILIES, ids=lambda path: path.name)


def toml(path):
    return tomllib.loads(path.read_text("utf-8"))


def source(package):
    (folder,) = (path.parent for path in package.glob("src/*/__about__.py"))
    return folder


@each_package
def test_a_package_is_one_import_name_and_says_what_it_is(package):
    name = "liger" if package.name == "liger-core" else package.name.replace("-", "_")
    assert [path.parent.name for path in package.glob("src/*/__init__.py")] == [name]
    stated = toml(package / "pyproject.toml")
    assert stated["project"]["name"] == package.name
    assert stated["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == [f"src/{name}"]
    assert stated["tool"]["hatch"]["version"]["path"] == f"src/{name}/__about__.py"
    assert importlib.import_module(name).__version__ == version(package.name)
    said = metadata(package.name)
    assert said["Name"] == package.name
    assert said["Summary"] == stated["project"]["description"]
    assert said["Requires-Python"] == ">=3.10"
    assert said["Description-Content-Type"] == "text/markdown"
    assert package.name in stated["project"]["urls"]["Changelog"]


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


@each_family
def test_each_adapter_of_a_family_has_an_entry_point_and_a_function(package):
    family = importlib.import_module(source(package).name)
    adapters = {name: value for name, value in vars(family).items() if isinstance(value, liger.Adapter)}
    stated = toml(package / "pyproject.toml")["project"]["entry-points"]["liger.adapters"]
    assert stated == {value.key: f"{family.__name__}:{name}" for name, value in adapters.items()}
    assert set(family.__all__) == {"__version__", *adapters, *(f"apply_liger_kernel_to_{name}" for name in adapters)}


@each_family
def test_a_family_that_is_not_installed_is_named(package):
    for key in toml(package / "pyproject.toml")["project"]["entry-points"]["liger.adapters"]:
        named = {family for word, family in discover._FAMILIES.items() if re.search(word, key)}
        assert named == {package.name}, key


@each_family
def test_both_ends_of_the_range_of_transformers_are_tested(package):
    (ours,) = (r for r in map(Requirement, requires(package.name) or []) if r.name == "transformers")
    (floor,) = (Version(s.version) for s in ours.specifier if s.operator == ">=")
    tested = {
        name: Version(requirement.removeprefix("transformers=="))
        for name in ("default", "floor")
        for requirement in environments()[name]["extra-dependencies"]
    }
    assert (tested["floor"].major, tested["floor"].minor) == (floor.major, floor.minor)
    assert ours.specifier.contains(tested["floor"])
    assert ours.specifier.contains(tested["default"])
    assert tested["floor"] < tested["default"]


@each_package
def test_readme_and_the_type_checker_know_every_package(package):
    assert f"`{package.name}`" in (ROOT / "README.md").read_text("utf-8")
    assert f"packages/{package.name}/src" in environments()["default"]["scripts"]["types"].split()


@each_family
def test_a_familys_readme_says_how_to_install_it_and_names_its_models(package):
    readme = (package / "README.md").read_text("utf-8")
    assert f"pip install {package.name}\n" in readme
    for key in toml(package / "pyproject.toml")["project"]["entry-points"]["liger.adapters"]:
        assert f"`{key}`" in readme.partition("```")[0], key


@each_package
def test_a_packages_tests_run_alone(package):
    tables = (toml(folder / "pyproject.toml")["tool"]["pytest"]["ini_options"] for folder in (package, ROOT))
    own, root = (set(table["addopts"].split()) for table in tables)
    assert "liger.testing.plugin" in own
    assert own <= root


def listed_in_readme():
    tree = (
        (ROOT / "README.md").read_text("utf-8").partition("## The source")[2].split("```text\n")[1].partition("```")[0]
    )
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
    patterns = ("packages/*/src/**/*.py", "benchmarks/**/*.py", "examples/**/*.py", "scripts/*.py", "docs/*.py")
    files = {str(path.relative_to(ROOT).as_posix()) for pattern in patterns for path in ROOT.glob(pattern)}
    assert not files - listed, f"README's tree lacks {files - listed}"


def test_a_file_of_more_than_300_lines_says_why_at_its_top():
    folders = ("packages", "tests", "benchmarks", "docs", "examples", "scripts")
    texts = {path: path.read_text("utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py")}
    long = {path: ast.get_docstring(ast.parse(text)) or "" for path, text in texts.items() if text.count("\n") > 300}
    assert long, "looks at nothing"
    assert not [path for path, said in long.items() if "\nOver 300 lines: " not in said]


@each_package
def test_a_package_has_owners_and_the_citation_its_licence(package):
    owners = dict(line.split() for line in (ROOT / "CODEOWNERS").read_text().splitlines() if not line.startswith("#"))
    assert owners.keys() == {"*", *(f"/packages/{family.name}/" for family in FAMILIES)}
    assert all(owner.startswith("@") for owner in owners.values())
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    stated = toml(package / "pyproject.toml")["project"]
    assert f"license: {stated['license']}\n" in cited
    assert f"repository-code: {stated['urls']['Homepage']}\n" in cited


@each_package
def test_a_changelog_is_cut_where_towncrier_expects(package):
    marker = toml(ROOT / "pyproject.toml")["tool"]["towncrier"]["start_string"]
    assert (package / "CHANGELOG.md").read_text("utf-8").startswith(f"# Changelog of {package.name}\n\n{marker}\n## ")
