#!/usr/bin/env bash
# Everything that a GPU is needed for, in one command; see benchmarks/README.md. --dry-run needs no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # the checkout itself, installed or not
exec "${PYTHON:-python3}" benchmarks/gpu_evidence.py "$@"
