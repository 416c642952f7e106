"""Release one package: `hatch run release liger-llama minor`. RELEASING.md says what comes before and after.

Nothing is changed before every check has passed: the tree is clean, there is something to release, the package's tests
pass as its users will run them, from its sdist with its wheel. A new core must pass the tests of every family that will
install it. Then the version is bumped, the changelog is cut from the fragments, and both are committed and tagged.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hatchling.version.scheme.standard import StandardScheme
from packaging.requirements import Requirement

from alone import PACKAGES, ROOT, build, empty_environment, install

CORE = "liger-core"
FRAGMENT = re.compile(r"(\d+|\+[\w-]+)\.(added|changed|fixed|removed)\.md")


class Refused(SystemExit):
    """Why nothing was released."""


def version_of(package: Path) -> str:
    """The version that the package's source states."""
    (about,) = package.glob("src/*/__about__.py")
    stated = re.search(r'^__version__ = "(.+)"$', about.read_text("utf-8"), re.M)
    if stated is None:
        raise Refused(f"{about} states no version")
    return stated[1]


def next_version(package: Path, wanted: str) -> str:
    """What `hatch version` makes of major, minor, patch or a version; the present one, said in full, is let through."""
    present = version_of(package)
    if wanted == present:
        return present
    try:
        return StandardScheme(str(package), {}).update(wanted, present, {})
    except ValueError as error:
        raise Refused(f"{package.name}: {error}") from error


def fragments(package: Path) -> list[Path]:
    """The changelog's fragments, each of a name that towncrier reads."""
    found = sorted(package.glob("changelog.d/*.md"))
    wrong = [path.name for path in found if not FRAGMENT.fullmatch(path.name)]
    if wrong:
        raise Refused(f"{package.name}: fragments must be named 12.added.md or +word.fixed.md, not {', '.join(wrong)}")
    return found


def check(package: Path, version: str) -> None:
    """Refuse a tree with changes, a tag that exists, and a release without news."""
    if dirty := git("status", "--porcelain"):
        raise Refused(f"the tree is not clean:\n{dirty}")
    if git("tag", "--list", tag(package, version)):
        raise Refused(f"{tag(package, version)} exists")
    if not fragments(package) and f"## {version}, unreleased" not in (package / "CHANGELOG.md").read_text("utf-8"):
        raise Refused(f"{package.name}: nothing to release, packages/{package.name}/changelog.d has no fragments")


def tag(package: Path, version: str) -> str:
    """The tag that names the package: `liger-llama-v1.2.0`."""
    return f"{package.name}-v{version}"


def users(package: Path, version: str) -> Iterator[Path]:
    """The packages whose tests this release must pass: itself, and the families whose range admits a new core."""
    yield package
    for family in PACKAGES if package.name == CORE else []:
        stated = re.search(r'"(liger-core[^"\[]+)"', (family / "pyproject.toml").read_text("utf-8"))
        if stated and Requirement(stated[1]).specifier.contains(version, prereleases=True):
            yield family


def test(package: Path, version: str) -> None:
    """Run the tests of each of `users` from its sdist, installed from wheels, with `package` at its new version."""
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        renewed = Path(folder) / package.name
        shutil.copytree(package, renewed)
        set_version(renewed, version)
        unpacked = {path.name: build(renewed if path == package else path, dist) for path in PACKAGES}
        for user in users(package, version):
            python = empty_environment(Path(folder) / f"for-{user.name}")
            install(python, dist, f"{user.name}[testing]")
            say(f"tests of {user.name} with {package.name} {version}")
            tests = [str(python), "-m", "pytest", "-q", "-n", os.environ.get("LIGER_TEST_WORKERS", "auto")]
            if subprocess.run(tests, cwd=unpacked[user.name], check=False).returncode:
                raise Refused(f"the tests of {user.name} fail with {package.name} {version}")


def set_version(package: Path, version: str) -> None:
    """Write the version where it stands."""
    if version != version_of(package):
        subprocess.run([sys.executable, "-m", "hatchling", "version", version], cwd=package, check=True)


def cut_changelog(package: Path, version: str, date: str) -> None:
    """Move the fragments into CHANGELOG.md under the version, below what stands there as its unreleased text."""
    path = package / "CHANGELOG.md"
    before, unreleased, first = path.read_text("utf-8").partition(f"## {version}, unreleased\n")
    path.write_text(before, encoding="utf-8")
    towncrier = [sys.executable, "-m", "towncrier", "build", "--yes", "--version", version, "--date", date]
    where = ["--config", str(ROOT / "pyproject.toml"), "--dir", str(package)]
    if fragments(package):
        subprocess.run([*towncrier, *where], cwd=ROOT, check=True, capture_output=True)
    heading = f"## {version}, {date}\n"
    before, _, news = path.read_text("utf-8").partition(heading)
    text = f"{before.rstrip()}\n\n{heading}{first.rstrip()}\n{news}" if unreleased else f"{before}{heading}{news}"
    path.write_text(f"{text.rstrip()}\n", encoding="utf-8")


def git(*arguments: str) -> str:
    """What git prints."""
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def say(line: str) -> None:
    """Print at once, between what the tests print."""
    print(line, flush=True)


def main() -> None:
    """Release one package, or say what that would do."""
    parser = argparse.ArgumentParser(prog="hatch run release", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", choices=[package.name for package in PACKAGES])
    parser.add_argument("version", help="major, minor, patch, or the version itself")
    parser.add_argument("--dry-run", action="store_true", help="change nothing, and say what would be done")
    parser.add_argument("--no-tests", action="store_true", help="they were run before")
    given = parser.parse_args()
    package = ROOT / "packages" / given.package
    version, date = next_version(package, given.version), datetime.date.today().isoformat()
    check(package, version)
    if given.dry_run:
        tested = [] if given.no_tests else [user.name for user in users(package, version)]
        say(f"would run the tests of {', '.join(tested) or 'nothing'}")
        say(f"would bump {package.name} from {version_of(package)} to {version}")
        say(f"would cut {len(fragments(package))} fragments into CHANGELOG.md under {version}, {date}")
        say(f"would commit, and tag {tag(package, version)}")
        return
    if not given.no_tests:
        test(package, version)
    set_version(package, version)
    cut_changelog(package, version, date)
    git("add", "--all", str(package))
    git("commit", "-m", f"{package.name} {version}")
    git("tag", "-a", tag(package, version), "-m", f"{package.name} {version}")
    say(f"{tag(package, version)} is tagged. Next: git push --follow-tags")


if __name__ == "__main__":
    main()
