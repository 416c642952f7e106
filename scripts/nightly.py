"""The families' tests on the newest transformers: `hatch run nightly` says which adapter broke, and where.

Nothing of this environment is changed: wheels of all packages are installed into an empty one beside the newest release
of transformers, in or out of the families' range, and the tests run from the sdists. Exits with pytest's status.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from alone import PACKAGES, build, empty_environment, install

INSTALLED = "installed"


def main() -> None:
    """Install, and run the tests of all families."""
    says = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="hatch run nightly", description=says, epilog="The rest goes to pytest.")
    parser.add_argument(
        "--transformers", default="", metavar="VERSION", help=f"not the newest, but this or {INSTALLED}"
    )
    given, for_pytest = parser.parse_known_args()
    families = [package for package in PACKAGES if package.name != "liger-core"]
    with tempfile.TemporaryDirectory() as folder:
        dist = Path(folder) / "dist"
        tests = [build(package, dist) / "tests" for package in PACKAGES]
        python = empty_environment(Path(folder))
        install(python, dist, *(f"{family.name}[testing]" for family in families))
        if given.transformers != INSTALLED:
            release = f"transformers=={given.transformers}" if given.transformers else "transformers"
            # Beside the one that the links lead to, which pip must not touch.
            pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--ignore-installed"]
            subprocess.run([*pip, release], check=True)
        version = (
            "from importlib.metadata import version; print('the families with transformers', version('transformers'))"
        )
        subprocess.run([str(python), "-c", version], check=True)
        plugin = ["-p", "liger.testing.plugin", "--import-mode=importlib", "-q", "--tb=line", "--rootdir", str(dist)]
        workers = ["-n", os.environ.get("LIGER_TEST_WORKERS", "auto")]
        of_families = [str(path) for path in tests if "liger_core" not in path.parent.name]
        command = [str(python), "-m", "pytest", *plugin, *workers, *for_pytest, *of_families]
        sys.exit(subprocess.run(command, cwd=dist, check=False).returncode)


if __name__ == "__main__":
    main()
