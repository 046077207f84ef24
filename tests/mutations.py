"""Small errors, put into the networks one at a time: a parity test must catch each.

    python tests/mutations.py        # or `make mutations`: some minutes

Each is written into a copy of the repository, in which the parity tests then run. Ends with 1 if an
error survives, or if the tests fail without one.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Mutation(NamedTuple):
    title: str
    file: str
    right: str
    wrong: str


MUTATIONS = (
    Mutation(
        "height and width of convolution kernels exchanged",
        "models/layers/convolution.py",
        "    reach = kernel.shape[0] // 2\n",
        "    kernel = kernel.swapaxes(1, 2)\n    reach = kernel.shape[0] // 2\n",
    ),
    Mutation(
        "group norm with Flax's epsilon",
        "models/layers/blocks.py",
        "NORM_EPSILON = 1e-5",
        "NORM_EPSILON = 1e-6",
    ),
    Mutation(
        "a kernel's gradient in which scans run together",
        "models/layers/slabs.py",
        "apart = (0, margin if len(x) > 1 else 0)",
        "apart = (0, 0)",
    ),
    Mutation(
        "a norm's scale with its bias's gradient",
        "models/layers/blocks.py",
        "for y in (cotangent * x, cotangent))",
        "for y in (cotangent, cotangent))",
    ),
    Mutation(
        "S_4 weighted as S_1",
        "models/deepsc/lesion.py",
        "total = weights[-1] * scales[-1]",
        "total = weights[0] * scales[-1]",
    ),
    Mutation(
        "to_tile one slice off",
        "geometry/grids.py",
        "(centres <= at[:, None]).sum(axis=1) - 1, 0, last)",
        "(centres <= at[:, None]).sum(axis=1), 0, last)",
    ),
    Mutation(
        "what lies beside the lungs mixed into their border",
        "data/preprocess.py",
        "    np.divide(volume, share, out=volume, where=lung)\n",
        "",
    ),
    Mutation(
        "slices sampled as if the scan had one less",
        "geometry/sampling.py",
        "np.arange(slices) * depth // slices",
        "np.arange(slices) * (depth - 1) // slices",
    ),
    Mutation(
        "cross-stitch weights transposed",
        "models/deepsc/network.py",
        "stitch[0, 1] * shared",
        "stitch[1, 0] * shared",
    ),
    Mutation(
        "a class activation map not about its mean",
        "models/deepsc/classifier.py",
        "masked(raw - masked_mean(raw, mask)[:, None, None, None], mask)",
        "masked(raw, mask)",
    ),
    Mutation(
        "a norm over all voxels, not the lungs'",
        "models/layers/blocks.py",
        "count = count_voxels(mask, shape)[:, None]",
        "count = count_voxels(None, shape)[:, None]",
    ),
    Mutation(
        "a coarse mask of the first voxel of a block",
        "models/layers/blocks.py",
        "mask = mask.reshape(shape).any(axis=axis + 1)",
        "mask = mask.reshape(shape).take(0, axis=axis + 1)",
    ),
    Mutation(
        "the focal mean over the field of view",
        "models/deepsc/losses.py",
        "    return loss.sum(PER_SCAN) / jnp.maximum(lungs.sum(PER_SCAN), 1)\n",
        "    return loss.mean(PER_SCAN)\n",
    ),
    Mutation(
        "scales supervised without the coarsest",
        "models/deepsc/losses.py",
        "    for segmentation in scales:\n",
        "    for segmentation in scales[1:]:\n",
    ),
    Mutation(
        "no smoothing above the fraction of Dice",
        "models/deepsc/losses.py",
        "(2 * overlap + epsilon) /",
        "(2 * overlap) /",
    ),
    Mutation(
        "cross-entropy without class weights",
        "models/deepsc/losses.py",
        "return class_weights[label] * optax",
        "return optax",
    ),
    Mutation(
        "class weights not normalised",
        "systems/system.py",
        "return counts.sum() / (counts.shape[0] * counts)",
        "return 1 / counts",
    ),
    Mutation(
        "a running variance that is biased",
        "models/layers/batch_norm.py",
        "/ jnp.maximum(count - 1, 1)",
        "/ jnp.maximum(count, 1)",
    ),
    Mutation(
        "batch norm's momentum the other way round",
        "models/layers/batch_norm.py",
        "MOMENTUM = 0.1",
        "MOMENTUM = 0.9",
    ),
    Mutation(
        "a quick connection's block after its input",
        "models/qchc_unet/network.py",
        "jnp.concatenate([y, x], axis=-1)",
        "jnp.concatenate([x, y], axis=-1)",
    ),
    Mutation(
        "a quick connection taken after the ReLU",
        "models/qchc_unet/network.py",
        "            total += a\n        if options.identity:",
        "            total += nn.relu(a)\n        if options.identity:",
    ),
    Mutation(
        "a decoder's projection dropped",
        "models/qchc_unet/network.py",
        "            total += ConvNorm(self.features, 1,",
        "            total += 0 * ConvNorm(self.features, 1,",
    ),
    Mutation(
        "a level left out of the hypercolumns",
        "models/qchc_unet/network.py",
        "scores = added if scores is None else scores + added",
        "scores = added if scores is None else scores + (i != 1) * added",
    ),
    Mutation(
        "upsampling with aligned corners",
        "geometry/grids.py",
        "shift = (k + 0.5) / factor - 0.5",
        "shift = k / factor",
    ),
    Mutation(
        "the mean of the classes' Tversky indices for their sum",
        "models/qchc_unet/losses.py",
        "(1 - index).sum(axis=-1)",
        "(1 - index).mean(axis=-1)",
    ),
    Mutation(
        "alpha and beta of the Tversky index exchanged",
        "models/qchc_unet/losses.py",
        "alpha * missed + beta * spurious",
        "beta * missed + alpha * spurious",
    ),
    Mutation(
        "overlapping tiles averaged in pairs",
        "systems/whole_scan.py",
        "            total[..., *box] += tile[..., *inside]\n            count[box] += 1",
        "            both = count[box] > 0\n"
        "            mean = (total[..., *box] * both + tile[..., *inside]) / (1 + both)\n"
        "            total[..., *box], count[box] = mean, 1",
    ),
    Mutation(
        "an image's maximum padded with 0",
        "models/layers/blocks2d.py",
        "constant_values=-jnp.inf",
        "constant_values=0",
    ),
    Mutation(
        "a residual block's first input given the second",
        "models/cnncf/network.py",
        "name=name)(i1, i2, weights, moves, train)",
        "name=name)(i2, i2, weights, moves, train)",
    ),
    Mutation(
        "a gate's counter that is not cleared",
        "models/cnncf/gate.py",
        'jnp.where(good, state["count"] + 1, 0)',
        'jnp.where(good, state["count"] + 1, state["count"])',
    ),
    Mutation(
        "a gate that opens one judgement late",
        "models/cnncf/gate.py",
        "opens = count >= rule.count",
        "opens = count > rule.count",
    ),
    Mutation(
        "distillation without the square of the temperature",
        "models/cnncf/distillation.py",
        "return temperature**2 * divergence",
        "return divergence",
    ),
    Mutation(
        "distillation's divergence the other way round",
        "models/cnncf/distillation.py",
        "(jax.scipy.special.xlogy(soft, soft) - soft * student)",
        "(jnp.exp(student) * (student - jnp.log(soft)))",
    ),
    Mutation(
        "soft labels of the case before",
        "data/pipeline.py",
        "self.taught[case.name]",
        "self.taught[self.cases[self.cases.index(case) - 1].name]",
    ),
    Mutation(
        "a teacher asked of the cases that it has seen",
        "data/folds.py",
        "(c.patient in fold) == held_out",
        "(c.patient in fold) != held_out",
    ),
    Mutation(
        "weight decay after the momentum",
        "systems/sgd.py",
        "        optax.add_decayed_weights(options.weight_decay),\n"
        "        optax.trace(options.momentum),\n",
        "        optax.trace(options.momentum),\n"
        "        optax.add_decayed_weights(options.weight_decay),\n",
    ),
)


def caught_by(mutation: Mutation | None) -> list[str]:
    """The parity tests that fail under a mutation: the first of them, for speed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder)
        for name in ("deepsc_jax", "tests"):
            shutil.copytree(ROOT / name, copy / name)
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutation is not None:
            path = copy / "deepsc_jax" / mutation.file
            text = path.read_text("utf-8")
            if text.count(mutation.right) != 1:
                sys.exit(f"{mutation.file}: {mutation.right!r} is not there once: mend MUTATIONS")
            path.write_text(text.replace(mutation.right, mutation.wrong), "utf-8")
        # `python -m` puts the copy before what is installed.
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow"]
        command += nearest_first((copy / "tests").rglob("test_parity_*.py"), mutation)
        # As `make test` has it: compiling is most of the time.
        env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
        done = subprocess.run(
            command, cwd=copy, env=env, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, 1):
            sys.exit(f"pytest could not run:\n{done.stdout}{done.stderr}")
        return re.findall(r"^FAILED tests/(.+?)(?: - .*)?$", done.stdout, re.MULTILINE)


def nearest_first(tests: Iterable[pathlib.Path], mutation: Mutation | None) -> list[str]:
    """All of them; first those named after the mutated file, then those in its folder of tests."""
    if mutation is None:
        return sorted(map(str, tests))
    mutated = pathlib.PurePath(mutation.file)

    def distance(test: pathlib.Path) -> tuple[bool, bool, str]:
        folder = test.parent.as_posix().endswith(f"tests/{mutated.parent}")
        return mutated.stem not in test.stem, not folder, str(test)

    return [str(test) for test in sorted(tests, key=distance)]


def main() -> int:
    """Try all; 1 if the tests fail as they are, or an error survives."""
    if failed := caught_by(None):
        print(f"without any error: {failed[0]} fails")
        return 1
    survivors = 0
    for mutation in MUTATIONS:
        found = caught_by(mutation)
        print(f"{mutation.title:52} {found[0] if found else 'SURVIVES'}", flush=True)
        survivors += not found
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
