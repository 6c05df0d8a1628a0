"""Settings of all tests. They test the `ppo_vec` that Python finds, so that a changed copy can be tested as well."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import ppo_vec  # noqa: F401  first: it chooses OpenBLAS's kernel, before NumPy is imported

# isort: split
import hypothesis
import pytest
import torch

# Derandomized: a test that fails once fails again, on any machine.
hypothesis.settings.register_profile("ppo_vec", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("ppo_vec")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """One torch thread, as in training; and no test leaves a process behind."""
    torch.set_num_threads(1)
    before = set(multiprocessing.active_children())
    yield
    assert not set(multiprocessing.active_children()) - before, "a worker outlived its test"


@pytest.fixture
def avx2() -> None:
    """For the tests of the kernels that ppo_vec chooses there. (macOS has no such file.)"""
    cpu = Path("/proc/cpuinfo")
    if not cpu.exists() or " avx2 " not in cpu.read_text():
        pytest.skip("needs Linux and a processor with AVX2")
