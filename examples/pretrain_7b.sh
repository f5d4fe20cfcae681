#!/usr/bin/env bash
""":" # One file, two readers: bash runs this block; to Python it is a string. Both end in the Python part below.
#   torchrun --nproc-per-node 8 examples/NAME.sh [--flag value ...]   torchrun starts one Python per GPU
#   bash examples/NAME.sh [--flag value ...]                          starts torchrun itself, on all local GPUs
#   mpirun -n 8 bash examples/NAME.sh, srun -n 8 ...                  the launcher's processes are the ranks
# The bash form reads NPROC, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"          # called as `sh file`
set -euo pipefail
SELF="$(cd -- "$(dirname -- "$0")" && pwd)/$(basename -- "$0")"
PY="${PYTHON:-python3}"
VENV="$(dirname -- "$(dirname -- "$SELF")")/.venv/bin/python"
if [ -z "${PYTHON:-}${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x "$VENV" ]; then
  PY="$VENV"                                                # what `make env` built, where no other one is active
fi
# Already one of many: torchrun --no-python, mpirun, srun. With NNODES, srun starts one torchrun a machine.
MANY="${OMPI_COMM_WORLD_SIZE:-${MV2_COMM_WORLD_SIZE:-${PMI_SIZE:-${SLURM_STEP_NUM_TASKS:-1}}}}"
[ "${NNODES:-1}" = 1 ] || MANY=1
if [ "$MANY" != 1 ] && [ -n "${NPROC:-}" ] && [ -z "${RANK:-}" ]; then
  echo "error: NPROC is '$NPROC', and mpirun or srun has started $MANY processes, which are the ranks: unset NPROC" >&2
  exit 2
fi
if [ "$MANY" != 1 ] || [ -n "${RANK:-}${WORLD_SIZE:-}" ]; then
  exec "$PY" -u "$SELF" "$@"
fi
if [ -z "${NPROC:-}" ]; then
  NPROC="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)"
  [ "$NPROC" -gt 0 ] || NPROC=1
fi
NNODES="${NNODES:-1}"
case "$NPROC$NNODES" in
  *[!0-9]*) echo "error: NPROC is '$NPROC' and NNODES is '$NNODES'; both must be whole numbers" >&2; exit 2 ;;
esac
WORLD="$((NPROC * NNODES))"
for arg in "$@"; do
  case "$arg" in                                            # what only prints needs no torchrun
    -h | --help | --check | --dry-run) exec "$PY" "$SELF" --world-size "$WORLD" "$@" ;;
  esac
done
if [ "$NNODES" = 1 ]; then
  RDZV=(--standalone)                                       # a free port: two runs on one machine do not collide
else
  RDZV=(--nnodes "$NNODES" --node-rank "${NODE_RANK:?set NODE_RANK}"
        --master-addr "${MASTER_ADDR:?set MASTER_ADDR}" --master-port "${MASTER_PORT:-29500}")
fi
# One process checks the flags first: a mistake is then one line and exit code 2, not torchrun's summary and 1. A config
# on standard input can be read once only, so the run itself reads it.
case " $* " in
  *" --config - "* | *" --config=- "*) ;;
  *) "$PY" "$SELF" --check --world-size "$WORLD" "$@" > /dev/null ;;
esac
# torchrun's own settings, which a torch without them does not read: it hands on a batch system's warnings too, and
# waits longer than a save may take before it kills.
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}"
export PET_SHUTDOWN_TIMEOUT="${PET_SHUTDOWN_TIMEOUT:-3900}"
exec "$PY" -m torch.distributed.run "${RDZV[@]}" --nproc-per-node "$NPROC" "$SELF" "$@"
":""" or '' << '#END-OF-PYTHON'
import os
import shlex
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[0] = ROOT                      # was examples/; `import engine` works without an install

# A model like Llama-2-7B. The global batch is 1,024 x 4,096 = 4.2 M tokens on any number of GPUs; 250,000 steps are
# 1.05 T tokens. `--dry-run` prints what a layout (--tp, --pp; the rest is dp) needs of each GPU.
ARGS = shlex.split("""
    --model 7b --seq-len 4096 --dtype bf16
    --global-batch 1024 --micro-batch 1 --recompute auto
    --lr 3e-4 --warmup 2000 --steps 250000      # cosine after the warm-up
    --eval-every 1000 --save-every 1000
""", comments=True)
ARGS += ["--out", f"{ROOT}/runs/pretrain_7b"]
# Unless the caller brings data: the corpus that `make demo` makes from Python's own documentation.
DEMO = ["--data", f"{ROOT}/demo/data/corpus", "--tokenizer", f"{ROOT}/demo/tokenizer"]

if __name__ == "__main__":              # children started by spawn import this file again
    from engine.pretrain import main
    sys.exit(main(sys.argv[1:], recipe=ARGS, demo=DEMO))  # the caller's flags win, and his data
#END-OF-PYTHON
