"""One package as its users get it: `hatch run alone liger-llama` runs its tests with nothing else of ours installed.

Sdists are built of all packages, and a wheel of each sdist. pip installs the one that is asked for, from these, into an
environment that has the third-party packages of this one and none of ours; its tests run from its sdist.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = sorted(path.parent for path in ROOT.glob("packages/*/pyproject.toml"))


def build(package: Path, dist: Path) -> Path:
    """Build a package's sdist, and its wheel from that sdist, into `dist`; return the folder of the unpacked sdist."""
    hatchling = [sys.executable, "-m", "hatchling", "build", "-d", str(dist)]
    subprocess.run([*hatchling, "-t", "sdist"], cwd=package, check=True, capture_output=True)
    (archive,) = dist.glob(f"{package.name.replace('-', '_')}-*.tar.gz")
    shutil.unpack_archive(archive, dist)
    unpacked = dist / archive.name.removesuffix(".tar.gz")
    subprocess.run([*hatchling, "-t", "wheel"], cwd=unpacked, check=True, capture_output=True)
    return unpacked


def empty_environment(folder: Path) -> Path:
    """Make a virtual environment in `folder` with this one's third-party packages and none of ours; its Python.

    Those are links, beside no `.pth` file, through which the editable installs of ours would be seen.
    """
    ours = tuple(package.name.replace("-", "_") for package in PACKAGES)
    (third_party := folder / "third-party").mkdir(parents=True)
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for path in Path(place).iterdir():
            if not path.name.startswith((*ours, "liger_", "liger.")) and path.suffix != ".pth" and path.name != "liger":
                (third_party / path.name).symlink_to(path)
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    where = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip())
    (site / "third-party.pth").write_text(f"{third_party}\n")
    return python


def install(python: Path, dist: Path, *requirements: str) -> None:
    """Install from the wheels in `dist` alone, dependencies too."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    subprocess.run([*pip, "--no-compile", "--find-links", str(dist), *requirements], check=True)


def main() -> None:
    """Build, install and test one package."""
    parser = argparse.ArgumentParser(prog="hatch run alone", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("package", choices=[package.name for package in PACKAGES])
    parser.add_argument("pytest", nargs=argparse.REMAINDER, help="what follows goes to pytest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        unpacked = {package.name: build(package, dist) for package in PACKAGES}
        python = empty_environment(Path(folder))
        install(python, dist, given.package)
        tests = [str(python), "-m", "pytest", *given.pytest]
        sys.exit(subprocess.run(tests, cwd=unpacked[given.package], check=False).returncode)


if __name__ == "__main__":
    main()
