#!/usr/bin/env bash
# The GPU table on one chip, in so many seconds:
#
#   launch/benchmark_gpu.sh --budget_s=420 --out=runs/gpu
#   launch/benchmark_gpu.sh --budget_s=900 --out=runs/small --small     # tiny networks, also on a CPU
#
# A row is a process and a file OUT/ROW.json, beside what it said, OUT/ROW.log. Rows come in this
# order: ours and the peer that is known as the best, the other rows of ours, memory by `plan` beside
# what the device held, and last the peers that take long to compile. A row that is not ended when
# the budget is, is ended then; what was not reached is named. Ends with 1 where a row failed.
# Settings: PYTHON (.venv/bin/python or python3). Needs coreutils' timeout, and the extras torch and
# monai.
set -uo pipefail

budget='' out='' small=''
for argument in "$@"; do
  case "$argument" in
    --budget_s=*) budget=${argument#*=} ;;
    --out=*) out=${argument#*=} ;;
    --small) small=1 ;;
    *) budget='' && break ;;
  esac
done
if ! [[ "$budget" =~ ^[1-9][0-9]{0,5}$ && -n "$out" ]]; then
  echo "usage: launch/benchmark_gpu.sh --budget_s=SECONDS --out=FOLDER [--small]" >&2
  exit 2
fi
if ! command -v timeout >/dev/null; then
  echo "error: timeout, of coreutils, was not found" >&2
  exit 2
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  [[ -x "$here/.venv/bin/python" ]] && PYTHON="$here/.venv/bin/python"
fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "error: PYTHON=$PYTHON is no program: name the one of the installation" >&2
  exit 2
fi
mkdir -p "$out" || exit 2

joint=("--flagfile=configs/deepsc.flags" --deepsc.joint.batch=1 '--scan_size=64,512,512')
inference=("--flagfile=configs/deepsc.flags" --work=inference '--scan_size=128,512,512')
unet3d=(--work=unet3d)
repeats=5
if [[ -n "$small" ]]; then
  tiny=('--working_size=16,16' '--tile=8,16,16' --slices=8 --depth_bucket=8 --tiles_per_scan=1
    --deepsc.inception=plain '--deepsc.inception_branches=1,3' --deepsc.inception_channels=4
    '--deepsc.lesion_channels=4,4,4' --deepsc.classifier_stem_channels=4
    '--deepsc.encoder_channels=4,4,4' --deepsc.norm_groups=2)
  joint=("${tiny[@]}" --deepsc.joint.batch=2)
  inference=("${tiny[@]}" --work=inference)
  unet3d+=('--tile=16,16,16' '--working_size=16,16' --depth_bucket=16 '--working_spacing_mm=20,20,20'
    '--unet3d.widths=4,8,8' --unet3d.segmentation.batch=2)
fi

failed=() unreached=()
row() { # NAME COMMAND ARGUMENTS...
  local name=$1 left=$((budget - SECONDS)) begun=$SECONDS
  shift
  if ((left < 1)); then
    unreached+=("$name")
    return
  fi
  # Ctrl-C reaches the row as well; 30 s later it is killed.
  timeout --foreground --kill-after=30 "$left" "$PYTHON" -m "deepsc_jax.$1" "${@:2}" \
    --json="$out/$name.json" >"$out/$name.log" 2>&1
  local code=$?
  case "$code" in
    0) echo "$name: $((SECONDS - begun)) s, $out/$name.json" ;;
    124 | 137) unreached+=("$name, cut off after $((SECONDS - begun)) s") ;;
    130) exit 130 ;;
    *)
      failed+=("$name")
      echo "error: $name ended with $code: $(tail -n 1 "$out/$name.log")" >&2
      ;;
  esac
}
timed() { # NAME FLAGS...
  row "$1" benchmark "--repeats=$repeats" "${@:2}"
}

timed unet3d_compiled "${unet3d[@]}" --peer=torch --variants=compiled_channels_last
timed joint_compiled "${joint[@]}" --peer=torch --variants=compiled
timed inference_eager "${inference[@]}" --peer=torch --variants=eager
timed segmentation "${joint[@]}" --work=train_segmentation --peer=torch --variants=channels_last
timed unet3d_dynunet "${unet3d[@]}" --peer=dynunet --variants=channels_last
timed forms "${joint[@]}" --peer=forms --variants=native,folded
timed joint_checkpointed "${joint[@]}" --peer=torch --variants=checkpointed

chip=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
case "$chip" in
  *A100*) platform=a100 ;;
  *H100*) platform=h100 ;;
  *H200*) platform=h200 ;;
  *B200*) platform=b200 ;;
  *) platform= ;;
esac
if [[ -n "$platform" && -z "$small" ]]; then
  row plan plan --flagfile=configs/deepsc.flags --deepsc.joint.batch=1 --depth=64 \
    "--platform=$platform"
else
  echo "plan: left out: it is of the full-size step on a chip that it knows, ${chip:-none} found"
fi

timed unet3d_max_autotune "${unet3d[@]}" --peer=torch --variants=max_autotune
timed joint_max_autotune "${joint[@]}" --peer=torch --variants=max_autotune

if [[ -s "$out/plan.json" && -s "$out/joint_compiled.json" ]]; then
  "$PYTHON" - "$out/plan.json" "$out/joint_compiled.json" <<'END'
import json
import sys

plan, measured = (json.load(open(path)) for path in sys.argv[1:])
planned = plan["rows"][0]["per_device_gib"]["peak"] * 1024
held = measured["rows"][0]["ours_peak_mib"]
print(f"joint step: plan says {planned:.0f} MiB, the device held {held:.0f} MiB")
END
fi
for name in "${unreached[@]}"; do
  echo "not reached: $name"
done
((${#failed[@]} == 0))
