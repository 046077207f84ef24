"""A small store that tests of batches read."""

import pytest
from batches import write

from deepsc_jax.data.store import Store


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The store of `batches.CASES`."""
    return write(tmp_path_factory.mktemp("out"))
