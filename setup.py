"""The package and, as `deepsc_jax.configs`, the flag files; all else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["deepsc_jax*"]), "deepsc_jax.configs"],
    package_dir={"deepsc_jax.configs": "configs"},
    package_data={
        "deepsc_jax.configs": ["*.flags", "*.csv"],
        "deepsc_jax.report": ["assets/*.css", "assets/*.js"],
    },
)
