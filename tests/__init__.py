"""Tests. Threads that wait, sleep: beside other work the suite is several times faster."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch and llama.cpp are imported
