#!/usr/bin/env bash
# What only a GPU can show, in under 8 minutes: docs/how-to/measure-on-a-gpu.md.
#
#     python -m benchmarks.gpu.wheels --python python3.12        # first, where there is a network
#     bash benchmarks/gpu.sh [--dry-run] [--out FILE] [PART …]   # there
#
# PYTHON names the interpreter that has torch. Without names of parts, all run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
"$python" benchmarks/gpu/unpack.py
PYTHONPATH=$PWD/.gpu/site/new exec "$python" -m benchmarks.gpu run "$@"
