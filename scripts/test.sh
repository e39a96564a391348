#!/usr/bin/env bash
# Set up what is missing, then run every check: format, lint, types and all tests.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
.venv/bin/mypy
# Tiny models keep one core busy each, so the files are shared out. Each worker loads the real model once, and may take 6 GB.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
room=$(awk '/^MemAvailable/ {print int($2 / 6000000)}' /proc/meminfo)
workers=$((cores < room ? cores : room))
workers=$((workers < 1 ? 1 : workers < 4 ? workers : 4))
export OMP_NUM_THREADS=$((cores / workers))
exec .venv/bin/python -m pytest -q --numprocesses="$workers" --dist=loadfile "$@"
