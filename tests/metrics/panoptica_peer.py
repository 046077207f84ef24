"""Lesion-wise detection beside panoptica's, on 200 random pairs of masks.

panoptica pins old versions, so it runs in an environment of its own:

    python -m venv /tmp/panoptica && /tmp/panoptica/bin/pip install panoptica
    python tests/metrics/panoptica_peer.py /tmp/panoptica/bin/python
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from mask_pairs import random_pairs

from deepsc_jax.metrics.lesionwise import detection, match_lesions

THEIRS = """
import json, sys
import numpy as np
from panoptica import ConnectedComponentsInstanceApproximator, InputType, NaiveThresholdMatching
from panoptica import Panoptica_Evaluator
evaluator = Panoptica_Evaluator(
    expected_input=InputType.SEMANTIC,
    instance_approximator=ConnectedComponentsInstanceApproximator(),
    instance_matcher=NaiveThresholdMatching(),
)
masks = np.load(sys.argv[1])
rows = []
for i in range(len(masks) // 2):
    pair = masks[f"pred{i}"].astype(np.uint8), masks[f"truth{i}"].astype(np.uint8)
    found = evaluator.evaluate(*pair, verbose=False)["ungrouped"]
    rows.append([found.tp, found.fp, found.fn, float(found.rq), float(found.pq)])
with open(sys.argv[2], "w") as file:
    json.dump(rows, file)
"""


def main(python: str) -> None:
    pairs = list(random_pairs())
    with tempfile.TemporaryDirectory() as folder:
        masks, rows = pathlib.Path(folder, "masks.npz"), pathlib.Path(folder, "rows.json")
        preds = {f"pred{i}": pair.pred for i, pair in enumerate(pairs)}
        truths = {f"truth{i}": pair.truth for i, pair in enumerate(pairs)}
        np.savez_compressed(masks, allow_pickle=False, **preds, **truths)
        subprocess.run([python, "-c", THEIRS, masks, rows], check=True, stdout=subprocess.DEVNULL)
        theirs = np.array(json.loads(rows.read_text()), float)
    ours = []
    for pair in pairs:
        found = detection([match_lesions(*pair, min_ml=0)])
        counts = [found.found, found.false_positives, found.missed]
        ours.append([*counts, found.f1, found.panoptic_quality])
    largest = np.abs(np.array(ours) - theirs).max(axis=0)
    print("pairs found, false positives, missed, F1, panoptic quality:")
    print(f"largest differences {largest.tolist()} on {len(pairs)} pairs of masks")
    print(f"pairs found in all: {theirs[:, 0].sum():.0f}, missed: {theirs[:, 2].sum():.0f}")


if __name__ == "__main__":
    main(sys.argv[1])
