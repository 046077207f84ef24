#!/usr/bin/env bash
# Train on every worker of a Cloud TPU VM (or a pod slice of them):
#
#   launch/tpu.sh NAME ZONE --flagfile=configs/deepsc.flags --data_dir=/mnt/data --workdir=/mnt/run
#
# Needs gcloud, this repository with its .venv (extra `tpu`) in ~/deepsc_jax on every worker, and
# the folders on a file system that all workers mount (Filestore, or a bucket through gcsfuse). JAX
# finds the other workers by itself. Training that saved on SIGTERM is started again; a TPU that is
# gone has to be created again first, after which the same command goes on.
# Settings: REPOSITORY (deepsc_jax, below the home folder).
set -uo pipefail

if (($# < 3)); then
  echo "usage: launch/tpu.sh NAME ZONE FLAGS_OF_TRAIN..." >&2
  exit 2
fi
name=$1
zone=$2
shift 2

printf -v flags ' %q' "$@"
command="cd ${REPOSITORY:-deepsc_jax} && exec .venv/bin/python -m deepsc_jax.train$flags"
while true; do
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$command"
  code=$?
  ((code == 255)) && echo "error: no ssh to a worker, or it was lost: training may still run there" >&2
  ((code == 75)) || exit "$code"
  echo "preempted: starting it again, to go on from the last checkpoint"
done
