"""What the process does with memory that was given back."""

import os
import subprocess
import sys

import pytest

COUNT = """
import resource, sys
import torch
from compress.machine import keep_freed_memory
for word in sys.argv[2:]:
    keep_freed_memory(word == "keep")
for _ in range(20):
    torch.ones(int(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(int(sys.argv[1]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

BETWEEN = """
import sys
import psutil
from compress.machine import keep_freed_memory
keep_freed_memory()
keep_freed_memory(sys.argv[1] == "keep")
import torch
torch.ones(2_000_000)
before = psutil.Process().memory_info().rss
pieces = [(torch.ones(12_000_000), torch.ones(25_000)) for _ in range(6)]  # 48 MB each, and what lies between them
small = [piece[1] for piece in pieces]
del pieces
print((psutil.Process().memory_info().rss - before) // 10**6)
"""


def faults(numbers: int, *ways: str) -> int:
    """Small pages that the kernel gives while 20 tensors follow each other, under the last of the policies."""
    command = [sys.executable, "-c", COUNT, str(numbers), *ways]
    environment = {**os.environ, "THP_MEM_ALLOC_ENABLE": "0"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout)


def held(way: str) -> int:
    """Megabytes that a process keeps of large tensors with small ones between them, once the large ones are gone."""
    return int(subprocess.run([sys.executable, "-c", BETWEEN, way], capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again():
    assert faults(12_000_000, "keep") * 10 < faults(12_000_000)  # 48 MB are 11,719 pages


def test_freed_memory_is_given_back_again():
    assert faults(12_000_000, "keep", "return") > 20 * 11_000  # 48 MB are 11,719 pages


def test_smaller_pieces_are_used_again_even_where_freed_memory_is_given_back():
    assert faults(2_000_000, "keep", "return") < 1900  # 8 MB are 1,953 pages
    assert faults(2_000_000) < 1900  # the C library keeps pieces of this size by itself


def test_freed_memory_between_what_stays_is_given_back():
    assert held("return") < 30 < 200 < held("keep")  # MB of the 288 that were freed


ASKED = """
import os, sys
from compress.machine import keep_freed_memory
keep_freed_memory(sys.argv[1] == "keep")
print(os.environ.get("THP_MEM_ALLOC_ENABLE"))
"""


@pytest.mark.parametrize("preset", [{}, {"THP_MEM_ALLOC_ENABLE": "0"}])
@pytest.mark.parametrize("way", ["keep", "return"])
def test_large_pages_are_asked_for_where_memory_is_given_back(way, preset):
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | preset
    command = [sys.executable, "-c", ASKED, way]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    assert found == ("0" if preset else "None" if way == "keep" else "1")
