"""Jobs that each run in a process of their own, and what they report, as it comes.

A process that ends gives back all that it took of the GPU, and what a package changed in it goes with it. The next one
imports what it needs while the present one works.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

IMPORTS = ("transformers.modeling_utils", "liger")
"""What takes seconds, and is imported before there is a job."""

Report = dict[str, Any]
Job = TypeVar("Job")


Work = Callable[[Job, Callable[[Report], None]], None]
"""A function of a module: what a process does with its job. It calls its second argument as often as it likes."""


class _Process:
    def __init__(self, work: Any, imports: tuple[str, ...]) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use a GPU that its parent has used
        self.connection, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, work, imports), daemon=True)
        self._process.start()
        there.close()

    def exit_code(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, work: Any, imports: tuple[str, ...]) -> None:
    for module in imports:
        import_module(module)
    try:
        job = connection.recv()
    except EOFError:  # there was no job for this one
        return
    work(job, connection.send)


def reports(
    work: Work[Job],
    jobs: Iterator[Job],
    deadline: float,
    at_once: int = 1,
    imports: tuple[str, ...] = IMPORTS,
) -> Iterator[tuple[Job, Report]]:
    """Each report with the job that made it. At `deadline` (of `time.monotonic`) what still runs is killed.

    A job is taken from `jobs` when a process is free for it. One that dies is reported as `{"failed": …}`.
    """
    waiting: list[_Process] = []
    running: dict[Connection, tuple[_Process, Job]] = {}
    try:
        while True:
            for job in _taken(jobs, at_once - len(running)):
                process = waiting.pop(0) if waiting else _Process(work, imports)
                process.connection.send(job)
                running[process.connection] = (process, job)
            if running and not waiting:
                waiting.append(_Process(work, imports))
            ready = wait(list(running), timeout=max(0.0, deadline - time.monotonic())) if running else []
            if not ready:
                return
            for connection in [connection for connection in running if connection in ready]:
                process, job = running[connection]
                try:
                    yield job, connection.recv()
                except EOFError:
                    del running[connection]
                    if code := process.exit_code():
                        yield job, {"failed": f"the process ended with exit code {code}"}
    finally:
        for process in [*waiting, *(process for process, _ in running.values())]:
            process.end()


def _taken(jobs: Iterator[Job], most: int) -> Iterator[Job]:
    for _ in range(most):
        try:
            yield next(jobs)
        except StopIteration:
            return
