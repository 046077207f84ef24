"""What `python -m deepsc_jax.benchmark` measures, and how."""
