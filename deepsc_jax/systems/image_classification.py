"""Classification of images: one stage, on the sampled slices of a scan.

The model's module has `build(options, data, layout)`, whose network takes slices `(N, T, H, W, 1)`,
one of an X-ray, and gives `logits (N, class)`; `losses(config, outputs, carried, label,
class_weights)`, the terms per scan and what is carried after the step; and, where it has them,
`evidence_layer(options)`, the map whose Grad-CAM a result holds, `notes(variables)` for results,
`weighted(options, terms)`, what each term adds to the loss where that is not the term, and
`warnings(options, stage_options, step, carried)` for training. A stage whose options are an
`SgdConfig` is trained by SGD, any other by Adam.

Where the model has teachers, `teachers(options)` gives the options of each one's network, and its
own have `teacher_folds` and the section `teacher`. Each teacher is trained once a fold, stage
`teacher1.fold1` and so on, and then the model itself, whose `losses` are given `teacher_logits
(N, teacher, class)`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from deepsc_jax.data.batch import Reads
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.geometry.sampling import slice_indices
from deepsc_jax.models.layers.blocks import standardise
from deepsc_jax.runtime import compiler
from deepsc_jax.runtime.types import Untyped
from deepsc_jax.systems.gradcam import grad_cam, shown
from deepsc_jax.systems.system import (
    Batch,
    Facts,
    Losses,
    Outputs,
    Predict,
    Stage,
    System,
    Variables,
    carried_of,
)


class ImageClassification(System):
    """A network that classifies a scan by its sampled slices."""

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Each teacher's, one a fold, and the network's own."""
        taught_by = self._teachers

        def stage(name: str, teachers: int = 0, fold: tuple[int, int] | None = None) -> Stage:
            options, reads = self.config.stage(name), Reads(slices=True, teachers=teachers)
            groups = taught_by if teachers else ()
            steps, batch = options.steps, options.batch
            return Stage(name, reads, ("classes",), steps, batch, fold=fold, taught_by=groups)

        of_teachers = (
            stage(name, fold=(i, len(group))) for group in taught_by for i, name in enumerate(group)
        )
        return (*of_teachers, stage("classification", len(taught_by)))

    @functools.cached_property
    def _teachers(self) -> tuple[tuple[str, ...], ...]:
        """The names of each teacher's stages."""
        options: Untyped = self.config.model
        count = len(getattr(self.model, "teachers", lambda _: ())(options))
        folds = range(1, options.teacher_folds + 1) if count else ()
        return tuple(tuple(f"teacher{k + 1}.fold{i}" for i in folds) for k in range(count))

    @functools.cached_property
    def _of_teachers(self) -> tuple["ImageClassification", ...]:
        configs = (
            dataclasses.replace(self.config, model=options)
            for options in self.model.teachers(self.config.model)
        )
        return tuple(type(self)(config, self.layout, self.model) for config in configs)

    def of(self, stage: Stage) -> System:
        """A teacher's own, of the options of its network."""
        if stage.fold is None:
            return self
        number = next(k for k, group in enumerate(self._teachers) if stage.name in group)
        return self._of_teachers[number]

    def init(self, key: Array, batch: Batch) -> Variables:
        """Fresh variables of the network, with those by which a gradient of a map is taken."""
        return dict(self.network.init(key, self._inputs(batch), train=False))

    def losses(
        self, stage: Stage, variables: Variables, batch: Batch, facts: Facts
    ) -> tuple[Losses, Variables]:
        """The model's terms."""
        out, changed = self.network.apply(
            variables, self._inputs(batch), train=True, mutable=carried_of(variables)
        )
        weights, said = facts["class_weights"], {}
        if stage.reads.teachers:
            said["teacher_logits"] = batch["teachers"]
        return self.model.losses(self.config, out, dict(changed), batch["label"], weights, **said)

    def weighted(self, stage: Stage, terms: Losses) -> Losses:
        """As the model says, if it does."""
        of_model = getattr(self.model, "weighted", None)
        if of_model is None:
            return super().weighted(stage, terms)
        return of_model(self.config.model, terms)

    def outputs(self, stage: Stage, variables: Variables, batch: Batch) -> Outputs:
        """The network's `logits` and `maps`, by running statistics."""
        del stage
        return self.network.apply(variables, self._inputs(batch), train=False)

    def measures(self, stage: Stage, variables: Variables, batch: Batch) -> dict[str, Array]:
        """Class probabilities, and the logits that they are of."""
        logits = self.outputs(stage, variables, batch)["logits"]
        return {"probabilities": jax.nn.softmax(logits), "logits": logits}

    def warnings(self, stage: Stage, step: int, carried: Variables) -> tuple[str, ...]:
        """The model's, if it has any."""
        of_model = getattr(self.model, "warnings", lambda *_: ())
        return of_model(self.config.model, self.config.stage(stage.name), step, carried)

    @property
    def _evidence_layer(self) -> str | None:
        """The map whose Grad-CAM is the evidence, where the model names one."""
        return getattr(self.model, "evidence_layer", lambda _: None)(self.config.model)

    def volumes(self, stage: Stage) -> tuple[str, ...]:
        """Evidence, where the model names a map for it."""
        del stage
        return () if self._evidence_layer is None else ("evidence_1",)

    def predictor(
        self, stage: Stage, variables: Variables, *, whole_scans: bool = False
    ) -> Predict:
        """The network on a scan's sampled slices, and its Grad-CAM for the most probable class.

        That of an image, as which a network sees all slices, is the same in every slice.
        """
        del whole_scans
        layer = self._evidence_layer
        data = self.config.data
        options = compiler.options(jax.default_backend(), data.tile, self.layout.form)

        @functools.partial(jax.jit, compiler_options=options)
        def program(variables: Variables, batch: Batch) -> tuple[Array, Array | None]:
            probabilities = self.measures(stage, variables, batch)["probabilities"][0]
            if layer is None:
                return probabilities, None
            return probabilities, grad_cam(self, stage, variables, batch, layer)

        notes = getattr(self.model, "notes", lambda _: ())(variables)

        def predict(volume: Float[np.ndarray, "depth height width"]) -> Prediction:
            slices = volume[slice_indices(len(volume), data.slices)]
            probabilities, heat = program(variables, {"slices": jnp.asarray(slices[None])})
            evidence = {}
            if heat is not None:
                sides = volume.shape[-(heat.ndim - 1) :]
                evidence["evidence_1"] = np.broadcast_to(shown(heat, sides)[0], volume.shape)
            return Prediction(classes=np.asarray(probabilities), evidence=evidence, notes=notes)

        return predict

    def _inputs(self, batch: Batch) -> Array:
        data = self.config.data
        return standardise(batch["slices"], data.intensity_mean, data.intensity_sd)[..., None]
