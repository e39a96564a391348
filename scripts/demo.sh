#!/usr/bin/env bash
# Set up what is missing, then run the main job: the quickstart recipe on SmolLM2-135M.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh
exec .venv/bin/compress apply "${1:-quickstart}" "${@:2}"
