"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from deepsc_jax.config import Config, Stage
from deepsc_jax.models.deepsc.network import DeepSC
from deepsc_jax.runtime import device_mesh
from deepsc_jax.training.optimizer import make_optimizer

PARTS: dict[Stage, tuple[str, ...]] = {
    "segmentation": ("inception_seg", "lesion"),
    "classification": ("inception_cls", "classifier"),
}


@struct.dataclass
class State:
    """Parameters of the whole network, the optimizer's state, and the steps taken.

    A stage that trains one task leaves the other's parameters as they are: their gradient is zero.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def example_batch(config: Config, scans: int = 1) -> dict[str, jax.Array]:
    """Zeros in the shapes of a joint batch, one tile a scan."""
    data = config.data
    return {
        "tiles": jnp.zeros((scans, 1, *data.tile)),
        "origins": jnp.zeros((scans, 1, 3), jnp.int32),
        "slices": jnp.zeros((scans, data.slices, *data.working_size)),
        "depth": jnp.full((scans,), data.tile[0], jnp.int32),
    }


def initial_params(config: Config, model: DeepSC) -> Any:
    """Parameters of all three subnets, drawn from `config.train.seed`."""
    init = jax.jit(lambda key, batch: model.init(key, batch, "joint")["params"])
    key = jax.random.key(config.train.seed, impl="rbg")  # compiles in a quarter of threefry's time
    return init(key, example_batch(config))


def create(config: Config, stage: Stage, params: Any) -> State:
    """The state at step 0 of `stage`."""
    optimizer = make_optimizer(config, stage)
    return State(step=jnp.zeros((), jnp.int32), params=params, opt_state=optimizer.init(params))


def sharding(config: Config, state: State, mesh: Mesh) -> State:
    """Where a state's parts lie: copies on every device, or Adam's moments split over `data`."""
    whole: Any = device_mesh.replicated(mesh)
    if not config.platform.shard_optimizer:
        return jax.tree.map(lambda _: whole, state)
    copied = jax.tree.map(lambda _: whole, state.params)
    return State(whole, copied, device_mesh.split_over_data(state.opt_state, mesh))


def join(segmentation: Any, classification: Any) -> Any:
    """The joint stage's start: each pre-trained part, and a fresh cross-stitch unit."""
    parts = {name: segmentation[name] for name in PARTS["segmentation"]}
    parts |= {name: classification[name] for name in PARTS["classification"]}
    return {name: parts.get(name, segmentation[name]) for name in segmentation}
