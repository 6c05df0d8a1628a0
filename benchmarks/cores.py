"""Trainings at the same time, each on cores of its own. learning.py, sweep.py and untuned.py use it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from queue import SimpleQueue


class Cores:
    """Lends each of `jobs` jobs its share of the cores that this process may use."""

    def __init__(self, jobs: int) -> None:
        self.shares: SimpleQueue[list[int]] = SimpleQueue()
        usable = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
        for job in range(jobs):
            self.shares.put(usable[job::jobs] or usable)

    @contextlib.contextmanager
    def share(self) -> Iterator[list[int]]:
        """Waits until a share is free."""
        mine = self.shares.get()
        try:
            yield mine
        finally:
            self.shares.put(mine)


def pin(process: int, cores: list[int]) -> None:
    """Lets a process (0: this one) use these cores only, where the system can do that."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process, cores)
