#!/usr/bin/env bash
# Run a script under torchrun, on one machine or several.
#
# One machine:       ./launch/torchrun.sh                          (examples/digits.py)
#                    ./launch/torchrun.sh train.py --lr 0.1
# Several machines:  the same command on each, with
#                    NNODES=2 HEAD=first-machine:29500 ./launch/torchrun.sh train.py
# NPROC is the number of processes on each machine; by default one per GPU, or 2 without any. On several
# machines give all of them the same ALLSTEP_SECRET, as `openssl rand -hex 16` makes one.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/environment.sh
[ $# -gt 0 ] || set -- examples/digits.py
allstep_environment examples

nproc=${NPROC:-$(python -c 'import torch; print(torch.cuda.device_count() or 2)')}
if [ -n "${HEAD:-}" ]; then
    meet=(--nnodes "${NNODES:?number of machines}" --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-allstep}")
else
    meet=(--standalone)
fi
exec torchrun "${meet[@]}" --nproc-per-node "$nproc" "$@"
