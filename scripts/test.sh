#!/usr/bin/env bash
# Set up what is missing, then run every check: format, lint, types and all tests.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
.venv/bin/ruff format --check --quiet .
.venv/bin/ruff check --quiet .
.venv/bin/mypy
# Tiny models keep one core busy each, so the files are shared out; a worker may take 5 GB of memory.
cores=$(nproc)
workers=$((cores < 4 ? cores : 4))
export OMP_NUM_THREADS=$((cores / workers))
exec .venv/bin/python -m pytest -q --numprocesses="$workers" --dist=loadfile "$@"
