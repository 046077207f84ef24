"""Joint segmentation and classification: DeepSC-COVID's three stages (paper, IV-E and V-A.3).

`segmentation` and `classification` are pre-trained apart; `joint` starts from both and trains all
three subnets together.
"""

from collections.abc import Mapping
from types import ModuleType

import jax
from jaxtyping import Array

from deepsc_jax.config import Config
from deepsc_jax.data.batch import Reads
from deepsc_jax.models.deepsc import config as options
from deepsc_jax.models.deepsc import losses
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime.types import PyTree
from deepsc_jax.systems.joint_prediction import JointPredictor
from deepsc_jax.systems.system import (
    Batch,
    Facts,
    Losses,
    Outputs,
    Predict,
    Stage,
    System,
    Variables,
    dice_at_thresholds,
)
from deepsc_jax.systems.watching import lesion_figures, plane, sampled_plane, telling_slice

# The subnets that a pre-training trains; its gradient of the others is zero.
PARTS = {
    "segmentation": ("inception_seg", "lesion"),
    "classification": ("inception_cls", "classifier"),
}


class Joint(System):
    """DeepSC-COVID, in tiles and sampled slices of a scan."""

    def __init__(self, config: Config, layout: Layout, model: ModuleType):
        super().__init__(config, layout, model)
        assert isinstance(config.model, options.Options)
        self.options = config.model

    @property
    def network_options(self) -> frozenset[str]:
        """All but those of the losses."""
        return super().network_options - options.OF_LOSSES

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Both pre-trainings and the joint training."""
        segmentation, classification, joint = (
            self.options.segmentation,
            self.options.classification,
            self.options.joint,
        )
        return (
            Stage(
                "segmentation",
                Reads(tiles="drawn"),
                ("lesions",),
                segmentation.steps,
                segmentation.batch,
            ),
            Stage(
                "classification",
                Reads(slices=True),
                ("classes",),
                classification.steps,
                classification.batch,
            ),
            Stage(
                "joint",
                Reads(tiles="all", slices=True),
                ("lesions", "classes"),
                joint.steps,
                joint.batch,
                after=("segmentation", "classification"),
            ),
        )

    def init(self, key: Array, batch: Batch) -> Variables:
        """Fresh parameters of all three subnets."""
        return dict(self.network.init(key, batch, "joint"))

    def start(self, stage: Stage, fresh: Variables, trained: Mapping[str, Variables]) -> Variables:
        """The joint stage's: each pre-trained part, and a fresh cross-stitch unit."""
        if not stage.after:
            return fresh
        params = dict(fresh["params"])
        for part in stage.after:
            params |= {name: trained[part]["params"][name] for name in PARTS[part]}
        return {"params": params}

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        """The terms of the paper's equation 11, and their weighted sum."""
        out = self.network.apply(variables, batch, stage.name, self.options.gradient_tiles)
        weights = facts["class_weights"]
        terms = losses.scan_losses(self.options, self.config.data, stage.name, out, batch, weights)
        return terms, {}

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> Outputs:
        """The network's `lesion`, `scales`, `logits`, `maps` and `weights`."""
        return self.network.apply(variables, batch, stage.name)

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """DSC at every threshold, over all tiles, and class probabilities."""
        out = self.outputs(stage, variables, batch)
        result = {}
        if "lesion" in out:
            result["dice"] = dice_at_thresholds(out["lesion"][..., 0], batch["lesions"])
        if "logits" in out:
            result["probabilities"] = jax.nn.softmax(out["logits"])
        return result

    def weighted(self, stage: Stage, terms: Losses) -> Losses:
        """The terms of `losses` times their weights."""
        del stage
        return {k: x * losses.weight(self.options, k) for k, x in terms.items() if k != "loss"}

    def watched(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Figures of lesions, the highest S_i inside them; scan, truth, S and M in one slice."""
        out, data = self.outputs(stage, variables, batch), self.config.data
        figures, pictures, depth = {}, {}, batch["depth"]
        slices = depth // 2
        if "lesions" in stage.learns:
            truth, origins = batch["lesions"] > 0, batch["origins"]
            free = batch["label"] == data.lesion_free_id
            lesion = out["lesion"][..., 0]
            figures = lesion_figures(lesion, truth, free, batch["voxel_ml"])
            for i, scale in enumerate(out["scales"], start=1):
                figures[f"scale_{i}_max"] = losses.highest_inside(scale, truth)
            slices = telling_slice(truth, origins, depth)
            volumes = {
                "scan": batch["tiles"],
                "truth": truth.astype(lesion.dtype),
                "lesion": lesion,
            }
            for name, x in volumes.items():
                pictures[name] = plane(x, origins, slices, data.working_size)
        if "classes" in stage.learns:
            pictures.setdefault("scan", sampled_plane(batch["slices"], slices, depth))
            masks = self.model.evidence(out, out["logits"].argmax(axis=-1))
            for i, mask in enumerate(masks, start=1):
                pictures[f"evidence_{i}"] = sampled_plane(mask, slices, depth)
        return figures | pictures

    def watched_parameters(self, stage: Stage, params: PyTree) -> dict[str, Array]:
        """The weights of the cross-stitch unit, in the joint stage."""
        if not (stage.after and self.options.cross_stitch):
            return {}
        weights, sides = params["cross_stitch"]["weights"], ("l", "c")
        return {
            f"cross_stitch_{to}{of}": weights[i, j]
            for i, to in enumerate(sides)
            for j, of in enumerate(sides)
        }

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        """The lesion probability, and M_1 to M_3."""
        lesion = ("lesion",) if "lesions" in stage.learns else ()
        masks = ("evidence_1", "evidence_2", "evidence_3") if "classes" in stage.learns else ()
        return lesion + masks

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        """The network over a whole scan, in bounded memory."""
        return JointPredictor(self.network, stage, variables, whole_scans=whole_scans)

    def broken(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> dict[str, Predict]:
        """`random_head`, the last matrix as it was initialised; `no_lesions`: its input is zero."""
        if "classes" not in stage.learns:
            return {}
        classifier = variables["params"]["classifier"]
        key = jax.random.key(self.config.train.seed)
        head = jax.nn.initializers.lecun_normal()(key, classifier["kernel"].shape)
        params = {**variables["params"], "classifier": {**classifier, "kernel": head}}
        whole = {"whole_scans": whole_scans}
        found: dict[str, Predict] = {
            "random_head": JointPredictor(self.network, stage, {"params": params}, **whole)
        }
        if "lesions" in stage.learns:
            found["no_lesions"] = JointPredictor(
                self.network, stage, variables, sees_lesions=False, **whole
            )
        return found
