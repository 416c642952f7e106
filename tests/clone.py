"""A copy of the repository that a test may commit to, release from and break."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
IDENTITY = {
    f"GIT_{role}_{what}": value
    for role in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "Someone"), ("EMAIL", "someone@example.org"))
}


class Clone:
    """The repository as it lies here, committed as one commit in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        for name in ("packages", "scripts"):
            ignored = shutil.ignore_patterns("__pycache__", ".*_cache", "dist")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        for name in ("pyproject.toml", ".gitignore"):
            shutil.copy(ROOT / name, folder / name)
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments):
        environment = {**os.environ, **IDENTITY}
        command = ["git", *arguments]
        done = subprocess.run(command, cwd=self.folder, check=True, capture_output=True, text=True, env=environment)
        return done.stdout.strip()

    def commit(self, **files):
        for name, text in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "-m", "work")

    def run(self, script, *arguments):
        """(exit status, what it said) of one of the scripts."""
        done = subprocess.run(
            [sys.executable, f"scripts/{script}", *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            env={**os.environ, **IDENTITY, "LIGER_TEST_WORKERS": "0"},
            check=False,
        )
        return done.returncode, done.stdout + done.stderr

    def state(self):
        return self.git("rev-parse", "HEAD"), self.git("status", "--porcelain"), self.git("tag")

    def read(self, name):
        return (self.folder / name).read_text("utf-8")

    def keep(self, *packages):
        """Leave only these packages."""
        for path in self.folder.glob("packages/*"):
            if path.name not in packages:
                shutil.rmtree(path)
