"""What the process does with memory that was given back."""

import subprocess
import sys

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


def faults(numbers: int, *ways: str) -> int:
    """Pages that the kernel gives while 20 tensors follow each other, under the last of the policies."""
    command = [sys.executable, "-c", COUNT, str(numbers), *ways]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_used_again():
    assert faults(12_000_000, "keep") * 10 < faults(12_000_000)  # 48 MB are 11,719 pages


def test_freed_memory_is_given_back_again():
    assert faults(2_000_000, "keep", "return") > 20 * 1900  # 8 MB are 1,953 pages
    assert faults(2_000_000) < 1900  # the C library keeps pieces of this size by itself
