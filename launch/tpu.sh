#!/usr/bin/env bash
# Train on every worker of a Cloud TPU VM (or a pod slice of them):
#
#   launch/tpu.sh NAME ZONE --flagfile=configs/deepsc.flags --data_dir=/mnt/data --workdir=/mnt/run
#
# Needs gcloud, this repository with its .venv (extra `tpu`) in ~/deepsc_jax on every worker, and
# the folders on a file system that all workers mount (Filestore, or a bucket through gcsfuse). JAX
# finds the other workers by itself. Training that saved on SIGTERM is started again after a pause,
# at most RESTARTS times; a crash at most 3 times, bad input and bad flags never. gcloud may run the
# command anew after a lost connection while the old one still trains: the new one then says who
# holds the folder, and ends with 1. A TPU that is gone has to be created again first, after which the
# same command goes on.
# Settings: REPOSITORY (deepsc_jax, below the home folder), RESTARTS (50), PAUSE (30 seconds; each
# restart waits that much longer than the one before, 10 minutes at most).
set -uo pipefail

if (($# < 3)); then
  echo "usage: launch/tpu.sh NAME ZONE FLAGS_OF_TRAIN..." >&2
  exit 2
fi
name=$1
zone=$2
shift 2

most_restarts=3
for setting in RESTARTS PAUSE; do
  if ! [[ "${!setting:-0}" =~ ^[0-9]{1,6}$ ]]; then
    echo "error: $setting=${!setting}: expected a whole number" >&2
    exit 2
  fi
done
printf -v flags ' %q' "$@"
command="cd ${REPOSITORY:-deepsc_jax} && exec .venv/bin/python -m deepsc_jax.train$flags"
for ((restarts = 0; ; restarts++)); do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
  code=$?
  # docs/exit-codes.md has the codes.
  always=
  at_most=
  case "$code" in
    75) always=1 ;;
    69 | 70 | 74 | 124 | 134 | 137 | 139 | 143) at_most=1 ;;
    130 | 255) echo "error: interrupted, or no ssh to a worker: training may still run there" >&2 ;;
  esac
  [[ -z "$always$at_most" ]] && exit "$code"
  most=$most_restarts
  [[ -n "$always" ]] && most=$((10#${RESTARTS:-50}))
  if ((restarts >= most)); then
    echo "error: ended with code $code after $restarts restarts: not started again" >&2
    exit "$code"
  fi
  pause=$((10#${PAUSE:-30} * (restarts + 1)))
  ((pause > 600)) && pause=600
  echo "ended with code $code: starting it again in $pause s, to go on from what is saved"
  sleep "$pause"
done
