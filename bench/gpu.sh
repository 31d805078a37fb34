#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds, tests, then attention beside PyTorch and decoding beside transformers. Ten
# minutes at most, no network needed where torch, transformers and the test tools are installed. Packages that are
# missing there may lie in a folder of wheels: WHEELS=folder bench/gpu.sh
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then "$PYTHON" -m pip install -q --no-index --find-links "$WHEELS" "$WHEELS"/*.whl; fi
"$PYTHON" setup.py -q build_ext --inplace
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
timeout 240 "$PYTHON" -P -m pytest -q -m gpu tests/test_gpu.py
timeout 90 "$PYTHON" bench/tree_attention.py --device cuda
timeout 240 "$PYTHON" bench/decode.py --device cuda
