"""Files and folders appear whole or not at all."""

import json
import pathlib

import pytest

from deepsc_jax.runtime.files import aside, folder_aside, write_json


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stop_halfway(path: pathlib.Path) -> None:
    path.write_text("half")
    raise OSError("disk full")


def test_a_file_that_fails_leaves_the_earlier_one(tmp_path: pathlib.Path):
    path = tmp_path / "a.txt"
    with aside(path) as partial:
        partial.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(OSError, match="disk full"), aside(path) as partial:
        stop_halfway(partial)
    assert path.read_text() == "first"
    assert names(tmp_path) == {"a.txt"}


def test_a_folder_that_fails_leaves_the_earlier_one(tmp_path: pathlib.Path):
    path = tmp_path / "a"
    with folder_aside(path) as partial:
        (partial / "x").write_text("first")
    with pytest.raises(OSError, match="disk full"), folder_aside(path) as partial:
        stop_halfway(partial / "y")
    assert names(path) == {"x"}
    with folder_aside(path) as partial:
        (partial / "z").write_text("second")
    assert names(path) == {"z"}
    assert names(tmp_path) == {"a"}


def test_of_two_that_fill_a_folder_at_once_one_stays_whole(tmp_path: pathlib.Path):
    path = tmp_path / "a"
    left = tmp_path / "partial-01234567-a"  # by a process that was killed
    other = tmp_path / "partial-01234567-b-a"  # another folder's
    left.mkdir()
    other.mkdir()
    slow = folder_aside(path)
    gone = slow.__enter__()
    with folder_aside(path) as fast:
        (fast / "x").write_text("fast")
    assert not gone.exists()
    with pytest.raises(FileNotFoundError):
        slow.__exit__(None, None, None)
    assert (path / "x").read_text() == "fast"
    assert names(tmp_path) == {"a", other.name}


def test_json_is_strict(tmp_path: pathlib.Path):
    path = tmp_path / "a.json"
    write_json({"b": [1, None]}, path)
    assert json.loads(path.read_text()) == {"b": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"b": float("nan")}, path)
    assert json.loads(path.read_text()) == {"b": [1, None]}
