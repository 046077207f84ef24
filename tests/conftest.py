"""What all tests share: eight CPU devices, parsed flags, and no compilation cache on disk."""

import jax
from absl import flags

# Before any test touches a device: tests of the mesh split batches over these.
jax.config.update("jax_num_cpu_devices", 8)
# A cache kept between runs would hide recompilation from the tests that count it.
jax.config.update("jax_enable_compilation_cache", False)
# Grain's workers and absl's flags raise UnparsedFlagAccessError outside app.run.
flags.FLAGS.mark_as_parsed()
