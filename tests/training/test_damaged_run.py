"""A run's folder that was edited or damaged: one line that names the file, whatever is in it."""

import copy
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

import pytest

from deepsc_jax.config import Config
from deepsc_jax.models import registry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training import workdir as workdirs

OTHERS = [
    None,
    True,
    -1,
    10**400,
    float("nan"),
    float("inf"),
    "x",
    [],
    {},
    [1],
    ["a", 2],
    [[1], []],
]


@pytest.fixture
def workdir(tmp_path: pathlib.Path) -> pathlib.Path:
    config = Config(model=registry.options(registry.DEFAULT)())
    record = workdirs.Record(config, "phantoms", "a1", {"segmentation": 0.5})
    workdirs.write(tmp_path, record)
    assert workdirs.read(tmp_path) == record
    return tmp_path


def outcome(workdir: pathlib.Path, name: str, content: bytes) -> str:
    """Whether the run is read with such a file; any other error than one line fails the test."""
    path = workdir / name
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        workdirs.read(workdir)
        return "read"
    except InputError as error:
        line = str(error)
    finally:
        path.write_bytes(before)
    return "refused" if str(path) in line and "\n" not in line else line


def places(value: Any, place: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    yield place
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from places(inner, (*place, key))


def changed(document: Any, place: tuple[str, ...], value: Any) -> Any:
    if not place:
        return value
    document = copy.deepcopy(document)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return document


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_no_value_in_place_of_another_is_more_than_a_line(workdir: pathlib.Path, name: str) -> None:
    document = json.loads((workdir / name).read_text())
    found = [
        outcome(workdir, name, json.dumps(changed(document, place, value)).encode())
        for place in places(document)
        for value in OTHERS
    ]
    assert set(found) == {"refused", "read"}
    assert found.count("refused") > len(found) / 2


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_no_damage_is_more_than_a_line(workdir: pathlib.Path, name: str) -> None:
    whole, draw = (workdir / name).read_bytes(), random.Random(3)
    contents = [b"", b"\xff\xfe", b"[" * 100_000, b"{", b"null", b"3", b"[]", b"\0" * 4096]
    contents += [whole[:end] for end in range(0, len(whole) - 2, 11)]
    for content in contents:
        assert outcome(workdir, name, content) == "refused"
    for _ in range(300):
        flipped = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            flipped[draw.randrange(len(whole))] = draw.randrange(256)
        assert outcome(workdir, name, bytes(flipped)) in ("refused", "read")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("deepsc", "inception"), "x"),
        (("deepsc", "inception_channels"), 4.0),
        (("deepsc", "cross_stitch"), 1),
        (("deepsc", "scale_weights"), [0.1, 0.2]),
        (("data", "tile"), "8,8,8"),
        (("data", "tile"), [8, 8, "8"]),
        (("train", "seed"), True),
    ],
)
def test_an_option_of_another_type_is_named(
    workdir: pathlib.Path, place: tuple[str, ...], value: Any
) -> None:
    path = workdir / "config.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), place, value)))
    with pytest.raises(InputError, match=rf"config\.json: .*{place[-1]}: .* found, .* expected"):
        workdirs.read(workdir)
