"""Grad-CAM: an identity, a network that is linear in a map, and what it refuses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import smallest_cnncf
from drawn import draw_params

from deepsc_jax.config import Config, StageConfig
from deepsc_jax.models.comparators import resnet3d
from deepsc_jax.models.layers.layout import Layout
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.gradcam import grad_cam, shown
from deepsc_jax.systems.image_classification import ImageClassification
from deepsc_jax.systems.system import initial

LABELS = jnp.array([0, 2])


def batch_of(data: Any, slices: int) -> Any:
    rng = np.random.default_rng(0)
    shape = (2, slices, *data.working_size)
    return {"slices": jnp.asarray(rng.uniform(size=shape), jnp.float32)}


def resnet() -> tuple[ImageClassification, Any]:
    options = resnet3d.Options(
        widths=(2, 3), blocks=(1, 1), classification=StageConfig(steps=1, batch=2)
    )
    data = dataclasses.replace(
        smallest_cnncf.DATA, slices=6, working_size=(16, 16), tile=(8, 16, 16)
    )
    system = ImageClassification(Config(options, data), Layout(), resnet3d)
    return system, batch_of(data, 6)


def published() -> tuple[ImageClassification, Any]:
    config = smallest_cnncf.config(variant="published", published_widths=(2, 3, 3, 4))
    return smallest_cnncf.system(config), batch_of(config.data, 1)


@pytest.mark.parametrize(
    "made",
    [pytest.param(resnet, id="3d", marks=pytest.mark.slow), pytest.param(published, id="2d")],
)
def test_before_a_mean_and_a_linear_layer_it_is_the_class_activation_map(made: Any):
    """Over the number of voxels: w_k is then the layer's weight over that number."""
    system, batch = made()
    (stage,) = system.stages

    class Module:
        def init(self, _: Any) -> Any:
            return initial(system)

    variables = draw_params(Module())
    last = list(system.outputs(stage, variables, batch)["maps"])[-1]
    maps = system.outputs(stage, variables, batch)["maps"][last]
    found = grad_cam(system, stage, variables, batch, last, LABELS)
    kernel = variables["params"]["fc"]["kernel"][:, LABELS]
    activation = jnp.einsum("i...k,ki->i...", maps, kernel) / np.prod(maps.shape[1:-1])
    assert (activation < 0).any()
    np.testing.assert_allclose(found, jax.nn.relu(activation), rtol=1e-4, atol=1e-7)
    # By default of the most probable class.
    logits = system.outputs(stage, variables, batch)["logits"]
    chosen = grad_cam(system, stage, variables, batch, last, logits.argmax(axis=-1))
    np.testing.assert_array_equal(grad_cam(system, stage, variables, batch, last), chosen)


def test_a_map_that_the_network_has_not_is_refused():
    system, batch = resnet()
    reason = r"--layer=layer9: --model=resnet3d has the maps layer1, layer2: give"
    with pytest.raises(InputError, match=reason):
        grad_cam(system, system.stages[0], initial(system), batch, "layer9")


def test_a_picture_is_linear_between_centres_and_at_most_1():
    heat = jnp.array([[[0.0, 4.0]], [[0.0, 0.0]]])
    expected = [[[0, 0.25, 0.75, 1]] * 2, [[0] * 4] * 2]
    np.testing.assert_allclose(shown(heat, (2, 4)), expected)
