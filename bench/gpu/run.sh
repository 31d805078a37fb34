#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: builds for the card that is there, runs the tests that need one, measures, and writes
# bench/results/<card>.json. Ten minutes at most; no network. `bench/gpu/run.sh --dry-run` runs every script on the CPU.
#   WHEELS=folder   packages that are missing there (FlashInfer, xFormers, ...), installed first
#   OUT=folder      gets a copy of the report and the logs
#   COMMIT=hash     where there is no git to ask
set -uo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
if [ -n "${WHEELS:-}" ]; then
    SITE=$(mktemp -d)
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --target "$SITE" "$WHEELS"/*.whl ||
        echo "some of the wheels could not be installed: going on without them"
    export PYTHONPATH="$SITE${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="bench${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" bench/gpu/run.py "$@"
