"""The deliberate errors of `make mutations` still have their place in the code."""

import pytest
from mutations import MUTATIONS, ROOT, Mutation


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.title)
def test_every_mutation_has_one_place(mutation: Mutation):
    text = (ROOT / "deepsc_jax" / mutation.file).read_text("utf-8")
    assert text.count(mutation.right) == 1
