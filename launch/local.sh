#!/usr/bin/env bash
# Train with N processes on this machine:
#
#   launch/local.sh N --flagfile=configs/deepsc.flags --data_dir=data --workdir=run ...
#
# The GPUs are shared out among the processes. Without GPUs each process has one CPU device, or as
# many as JAX_NUM_CPU_DEVICES says. Other settings: PYTHON (.venv/bin/python or python3), PORT.
# Needs bash 5.1.
#
# SIGTERM, a closed terminal (SIGHUP) and Ctrl-C are passed on: the job saves, and this ends with 75 or 130 (the same command goes
# on); Ctrl-C pressed again ends all at once. If a process dies, the others are ended too and this
# ends with that process's code; if this is killed, the processes save and end.
set -euo pipefail

if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 501)); then
  echo "error: bash 5.1 or newer is needed, and this is $BASH_VERSION: start it with another bash" >&2
  exit 2
fi
if ! [[ "${1:-}" =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh NUMBER_OF_PROCESSES FLAGS_OF_TRAIN..." >&2
  exit 2
fi
processes=$1
shift

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x "$here/.venv/bin/python" ]] && PYTHON="$here/.venv/bin/python"
fi
PORT=${PORT:-$((20000 + RANDOM % 10000))}
if ! command -v "$PYTHON" >/dev/null; then
  echo "error: PYTHON=$PYTHON is no program: name the one of the installation" >&2
  exit 2
fi

gpus=()
if [[ -n "${CUDA_VISIBLE_DEVICES:-}" ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
elif [[ "${JAX_PLATFORMS:-}" != cpu ]] && command -v nvidia-smi >/dev/null; then
  mapfile -t gpus < <(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null || true)
fi
each=$((${#gpus[@]} / processes))
if ((${#gpus[@]} > 0 && each * processes != ${#gpus[@]})); then
  echo "error: ${#gpus[@]} GPUs cannot be shared out evenly among $processes processes: give" \
    "another number, or choose GPUs with CUDA_VISIBLE_DEVICES" >&2
  exit 2
fi

pids=()
stopped= # the code with which all is well
pass_on() { kill "-$1" "${pids[@]}" 2>/dev/null || true; }
trap 'stopped=75; pass_on TERM' TERM HUP
trap 'if [[ "$stopped" == 130 ]]; then pass_on KILL; exit 130; fi; stopped=130; pass_on TERM' INT

# The kernel sends SIGTERM to the processes once this is gone, or, where it cannot, a watch does.
with_me=()
if setpriv --pdeathsig TERM true 2>/dev/null; then
  with_me=(setpriv --pdeathsig TERM --)
fi

for ((i = 0; i < processes; i++)); do
  if ((each > 0)); then
    mine=("${gpus[@]:i * each:each}")
    CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${mine[*]}")
    export CUDA_VISIBLE_DEVICES
  fi
  # In the background it ignores Ctrl-C, which the trap above passes on as SIGTERM.
  "${with_me[@]}" "$PYTHON" -m deepsc_jax.train "$@" --coordinator="localhost:$PORT" \
    --num_processes="$processes" --process_id="$i" &
  pids+=($!)
done
if [[ -n "$stopped" ]]; then # it came before there were all of them, or before they could hear it
  sleep 1
  pass_on TERM
fi
if ((${#with_me[@]} == 0)); then
  (
    trap - TERM HUP INT
    while kill -0 $$ 2>/dev/null; do sleep 1; done
    pass_on TERM
  ) &
  watch=$!
  trap 'kill "$watch" 2>/dev/null || true' EXIT
fi

# The first one to end decides, unless all end alike.
left=$processes
while ((left > 0)); do
  code=0
  wait -n -p ended "${pids[@]}" 2>/dev/null || code=$? # bash would say "Killed" on stderr
  # A signal to this script interrupts the wait: nothing has ended.
  [[ -z "${ended:-}" ]] && continue
  left=$((left - 1))
  for i in "${!pids[@]}"; do
    [[ "${pids[i]}" == "$ended" ]] && number=$i && unset "pids[i]"
  done
  if ((code == 75)) || { [[ -n "$stopped" ]] && ((code == 143)); }; then
    stopped=${stopped:-75}
  elif ((code != 0)); then
    echo "error: process $number of $processes ended with code $code: ending the others; the same" \
      "command goes on from the last checkpoint, or from the beginning where there is none" >&2
    pass_on KILL
    wait "${pids[@]}" 2>/dev/null || true
    exit "$code"
  fi
done
exit "${stopped:-0}"
