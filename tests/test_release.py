"""The release of one package, in a clone: what is refused, what a dry run leaves, what is bumped, cut and tagged."""

from __future__ import annotations

import datetime
import re
import shutil

import pytest

from clone import ROOT, Clone

LLAMA = "packages/liger-llama"
TODAY = datetime.date.today().isoformat()


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


FRAGMENTS = {
    f"{LLAMA}/changelog.d/12.added.md": "A switch for `rope`.\n",
    f"{LLAMA}/changelog.d/+head.fixed.md": "A head without a weight is declined.\n",
}


def test_a_dry_run_says_what_would_be_done_and_changes_nothing(clone):
    clone.commit(**FRAGMENTS)
    before = clone.state()
    status, said = clone.run("release.py", "liger-llama", "minor", "--dry-run")
    assert status == 0, said
    assert clone.state() == before
    for line in (
        "would run the tests of liger-llama",
        "would bump liger-llama from 0.1.0 to 0.2.0",
        f"would cut 2 fragments into CHANGELOG.md under 0.2.0, {TODAY}",
        "would commit, and tag liger-llama-v0.2.0",
    ):
        assert line in said.splitlines()


def test_the_first_release_dates_what_was_written_as_unreleased_and_the_next_takes_the_fragments(clone):
    first = clone.read(f"{LLAMA}/CHANGELOG.md").partition("## 0.1.0, unreleased")[2].strip()
    assert first
    status, said = clone.run("release.py", "liger-llama", "0.1.0", "--no-tests")
    assert status == 0, said
    assert clone.read(f"{LLAMA}/CHANGELOG.md").endswith(f"<!-- releases -->\n\n## 0.1.0, {TODAY}\n\n{first}\n")
    clone.commit(**FRAGMENTS)
    status, said = clone.run("release.py", "liger-llama", "minor", "--no-tests")
    assert status == 0, said
    news = "### Added\n\n- A switch for `rope`. (#12)\n\n### Fixed\n\n- A head without a weight is declined."
    top = clone.read(f"{LLAMA}/CHANGELOG.md").partition("<!-- releases -->\n\n")[2]
    assert top.startswith(f"## 0.2.0, {TODAY}\n\n{news}\n\n")
    assert first in top
    assert '__version__ = "0.2.0"' in clone.read(f"{LLAMA}/src/liger_llama/__about__.py")
    _, dirty, tags = clone.state()
    assert not dirty
    assert tags.split() == ["liger-llama-v0.1.0", "liger-llama-v0.2.0"]
    assert clone.git("log", "-1", "--format=%s", "liger-llama-v0.2.0") == "liger-llama 0.2.0"
    changed = clone.git("diff", "--name-only", "HEAD~1").split()
    assert all(path.startswith(f"{LLAMA}/") for path in changed)
    assert not list((clone.folder / LLAMA).glob("changelog.d/*"))


def test_fragments_join_the_text_of_a_version_that_is_not_released(clone):
    clone.commit(**FRAGMENTS)
    first = clone.read(f"{LLAMA}/CHANGELOG.md").partition("## 0.1.0, unreleased\n")[2].strip()
    assert clone.run("release.py", "liger-llama", "0.1.0", "--no-tests")[0] == 0
    text = clone.read(f"{LLAMA}/CHANGELOG.md")
    assert text.count("## 0.1.0") == 1
    assert f"## 0.1.0, {TODAY}\n\n{first}\n\n### Added\n\n- A switch" in text


@pytest.mark.parametrize(
    ("files", "arguments", "said"),
    [
        ({}, ("liger-llama", "minor"), "nothing to release"),
        ({}, ("liger-llama", "0.0.9"), "not higher than the original version"),
        ({}, ("liger-nobody", "minor"), "invalid choice: 'liger-nobody'"),
        ({f"{LLAMA}/changelog.d/rope.md": "?"}, ("liger-llama", "0.1.0"), "must be named 12.added.md"),
    ],
)
def test_what_cannot_be_released_is_refused(clone, files, arguments, said):
    clone.commit(**files, unrelated="x")
    before = clone.state()
    status, told = clone.run("release.py", *arguments, "--no-tests")
    assert status != 0
    assert said in told
    assert clone.state() == before


def test_a_tree_with_changes_is_refused_and_a_tag_is_never_moved(clone):
    (clone.folder / LLAMA / "src/liger_llama/left_over.py").write_text("")
    status, said = clone.run("release.py", "liger-llama", "0.1.0", "--no-tests")
    assert status != 0
    assert "the tree is not clean:\n?? packages/liger-llama/src/liger_llama/left_over.py" in said
    clone.commit()
    clone.git("tag", "liger-llama-v0.1.0")
    assert "liger-llama-v0.1.0 exists" in clone.run("release.py", "liger-llama", "0.1.0", "--no-tests")[1]


VERSION = "import liger\n\ndef test_version():\n    assert liger.__version__ == {!r}\n"


def only_these_tests(clone, text):
    """Two families are left, with one test each."""
    clone.keep(*CHEAP)
    for name in CHEAP:
        shutil.rmtree(clone.folder / "packages" / name / "tests")
    clone.commit(**{f"packages/{name}/tests/test_version.py": text for name in CHEAP})


CHEAP = ("liger-core", "liger-llama", "liger-phi")


def test_a_new_core_must_pass_the_tests_of_the_families(clone):
    """They run with its wheel, which has the new version already."""
    fragment = {"packages/liger-core/changelog.d/+op.added.md": "An op.\n"}
    only_these_tests(clone, VERSION.format("0.2.0"))
    clone.commit(**fragment, **{"packages/liger-phi/tests/test_version.py": VERSION.format("0.1.0")})
    before = clone.state()
    status, said = clone.run("release.py", "liger-core", "minor")
    assert "tests of liger-llama with liger-core 0.2.0" in said
    assert "the tests of liger-phi fail with liger-core 0.2.0" in said
    assert status != 0
    assert clone.state() == before
    clone.commit(**{"packages/liger-phi/tests/test_version.py": VERSION.format("0.2.0")})
    status, said = clone.run("release.py", "liger-core", "minor")
    assert status == 0, said
    assert clone.state()[2] == "liger-core-v0.2.0"


def test_a_family_whose_range_a_new_core_leaves_is_not_asked(clone):
    clone.commit(**{"packages/liger-core/changelog.d/+op.removed.md": "An op.\n"})
    assert "would run the tests of liger-core\n" in clone.run("release.py", "liger-core", "major", "--dry-run")[1]


def test_every_fragment_has_a_name_that_towncrier_reads():
    for path in ROOT.glob("packages/*/changelog.d/*"):
        assert re.fullmatch(r"(\d+|\+[\w-]+)\.(added|changed|fixed|removed)\.md", path.name), path
