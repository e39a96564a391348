"""What the process does with memory that was given back."""

import subprocess
import sys

COUNT = """
import resource, sys
import torch
from compress.machine import keep_freed_memory
for word in sys.argv[1:]:
    keep_freed_memory(word == "keep")
for _ in range(20):
    torch.ones(12_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(12_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again():
    faults = {}
    for way in ("", "keep", "keep return"):
        done = subprocess.run([sys.executable, "-c", COUNT, *way.split()], capture_output=True, text=True, check=True)
        faults[way] = int(done.stdout)
    assert faults["keep"] * 10 < faults[""]  # 48 MB are 11,719 pages
    assert faults["keep return"] > 0.9 * faults[""]
