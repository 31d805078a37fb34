#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: tests, then attention beside PyTorch and decoding beside transformers. Ten minutes
# at most, no network needed where torch, transformers and the test tools are installed.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
timeout 240 "$PYTHON" -P -m pytest -q -m gpu tests/test_gpu.py
timeout 90 "$PYTHON" bench/tree_attention.py --device cuda
timeout 240 "$PYTHON" bench/decode.py --device cuda
