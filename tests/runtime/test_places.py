"""Where a command writes, looked at before its work begins."""

import pathlib

import pytest

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import write_own_json
from deepsc_jax.runtime.places import output_file, output_folder


def test_a_users_file_is_refused_before_the_work_and_ours_is_replaced(
    tmp_path: pathlib.Path,
) -> None:
    path = tmp_path / "plan.json"
    assert output_file("json", str(path)) == path
    write_own_json({"a": 1}, path)
    write_own_json({"a": 2}, path)
    assert output_file("json", str(path)) == path
    path.write_text("a user's own")
    with pytest.raises(InputError, match=r"plan\.json: was not written here or has been changed"):
        output_file("json", str(path))
    with pytest.raises(InputError, match=r"plan\.json: was not written here or has been changed"):
        write_own_json({"a": 3}, path)
    with pytest.raises(InputError, match=r"plan\.json: was not written here or has been changed"):
        output_folder("out", str(tmp_path), "other.json", "plan.json")
    assert output_folder("out", str(tmp_path), "other.json") == tmp_path
    assert path.read_text() == "a user's own"


@pytest.mark.parametrize("place", [output_file, output_folder])
def test_an_address_makes_no_folder(
    place: object, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(place)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(InputError, match="gs://bucket/x: is an address, expected a path"):
        place("out", "gs://bucket/x")
    assert not list(tmp_path.iterdir())
    place("out", "~/below/x")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
