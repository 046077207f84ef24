"""What training carries from step to step."""

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from deepsc_jax.runtime import device_mesh
from deepsc_jax.runtime.types import PyTree
from deepsc_jax.systems.system import Stage, System, Variables


@struct.dataclass
class State:
    """The steps taken, the network's variables, and the optimizer's state.

    `params` are trained. `carried` are the network's other collections: batch statistics, counters,
    teachers. A stage that trains one part leaves the others as they are: their gradient is zero.
    `average` is the moving average of `params`, empty where there is none.
    """

    step: jax.Array
    params: PyTree
    carried: Variables
    opt_state: optax.OptState
    average: PyTree

    @property
    def variables(self) -> Variables:
        """The network's variables, as it is validated and predicts."""
        return {"params": self.average or self.params, **self.carried}


def create(system: System, stage: Stage, variables: Variables) -> State:
    """The state at step 0 of `stage`."""
    carried = {name: values for name, values in variables.items() if name != "params"}
    params = variables["params"]
    opt_state = system.optimizer(stage).init(params)
    # A copy: a state's buffers are given away at each step, and none may be given twice.
    average = jax.tree.map(jnp.copy, params) if system.config.train.average_decay else {}
    return State(jnp.zeros((), jnp.int32), params, carried, opt_state, average)


def sharding(state: State, mesh: Mesh, *, shard_optimizer: bool) -> State:
    """Where a state's parts lie: copies on every device, or Adam's moments split over `data`."""
    whole: PyTree = device_mesh.replicated(mesh)
    where: State = jax.tree.map(lambda _: whole, state)
    if not shard_optimizer:
        return where
    moments = device_mesh.split_over_data(state.opt_state, mesh)
    return State(whole, where.params, where.carried, moments, where.average)
