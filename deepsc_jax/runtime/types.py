"""Names for values that Python's types describe no further, one for each meaning."""

from typing import Any

JsonObject = dict[str, Any]  # plain values, lists and objects, as JSON has them
JsonValue = Any  # one of these values
PyTree = Any  # arrays in nested containers, of whatever structure
Untyped = Any  # an object of a library without types for it
