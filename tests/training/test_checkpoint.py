"""Checkpoints: what is kept, their sums, and what becomes of damaged ones."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training import checkpoint, checksums
from deepsc_jax.training.checkpoint import Checkpoints
from deepsc_jax.training.state import State


def state(step: int) -> State:
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params, moments = {"w": jnp.arange(3000.0) + step}, ({"m": jnp.ones(7)},)
    carried = {"counters": {"seen": jnp.asarray(2 * step)}}
    whole = State(jnp.asarray(step), params, carried, moments, {})  # type: ignore[arg-type]
    return jax.device_put(whole, where)


def save(stage: pathlib.Path, scores: dict[int, float | None]) -> None:
    """A checkpoint per step, with its score if it was validated."""
    checkpoints = Checkpoints(stage, writer=True)
    for step, score in scores.items():
        checkpoints.save(state(step), {"batch": step})
        if score is not None:
            checkpoints.add_record(step, {"score": score})
    checkpoints.close()


def kept(stage: pathlib.Path) -> list[str]:
    return sorted(path.name for path in stage.iterdir())


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_the_two_newest_and_the_best_are_kept(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {1: 0.2, 2: 0.9, 3: None, 4: 0.3, 5: None})
    assert kept(tmp_path) == ["2", "4", "5"]
    checkpoints = Checkpoints(tmp_path)
    assert (checkpoints.best_step(), checkpoints.latest_step()) == (2, 5)
    contents = checkpoints.load(state(0), 4)
    records = [checkpoints.record(step) for step in (2, 4, 5)]
    checkpoints.close()
    np.testing.assert_array_equal(contents["state"].params["w"], np.arange(3000.0) + 4)
    assert contents["state"].carried["counters"]["seen"] == 8
    assert contents["data"] == {"batch": 4}
    assert records == [{"score": 0.9}, {"score": 0.3}, None]


def test_of_equal_scores_the_newest_is_the_best(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {1: 0.5, 2: 0.5, 3: None, 4: None})
    assert kept(tmp_path) == ["2", "3", "4"]


def test_what_is_no_longer_the_best_goes_when_a_better_one_is_known(
    tmp_path: pathlib.Path,
) -> None:
    save(tmp_path, {1: 0.5, 2: None, 3: 0.7})
    assert kept(tmp_path) == ["2", "3"]


class KilledError(Exception):
    """In the place of a kill."""


@pytest.mark.parametrize("killed_at", ["write_json", "aside", "none"])
def test_a_saved_step_is_whole_whatever_happens_while_its_record_is_added(
    tmp_path: pathlib.Path, killed_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its state is written once: adding a record touches no file of it."""

    def kill(*_: object) -> None:
        raise KilledError

    checkpoints = Checkpoints(tmp_path, writer=True)
    checkpoints.save(state(2), {"batch": 2})
    checkpoints.save(state(4), {"batch": 4})
    checkpoints.wait()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "4" / "state").rglob("*")}
    if killed_at == "none":
        checkpoints.add_record(4, {"score": 0.5})
    else:
        with monkeypatch.context() as patch:
            patch.setattr(checksums, killed_at, kill)
            with pytest.raises(KilledError):
                checkpoints.add_record(4, {"score": 0.5})
    checkpoints.close()
    (tmp_path / "4" / ".partial-01234567-SHA256SUMS").touch()  # as a kill leaves it
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "4" / "state").rglob("*")}
    again = Checkpoints(tmp_path, writer=True)
    assert again.latest_step() == 4
    assert again.record(4) == ({"score": 0.5} if killed_at == "none" else None)
    again.add_record(4, {"score": 0.25})
    assert again.best_step() == 4
    again.close()
    assert checksums.damage(tmp_path / "4") is None
    assert checksums.read_record(tmp_path / "4") == {"score": 0.25}


def test_a_record_that_is_not_as_it_was_written_is_named(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {2: 0.9, 4: 0.1})
    (tmp_path / "2" / "validation.json").write_text('{"score": 0.0}')
    with pytest.raises(InputError, match=r"/2/validation.json: is not as it was written: copy"):
        Checkpoints(tmp_path)


def test_every_file_of_a_checkpoint_has_its_sum(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {1: 0.5})
    folder = tmp_path / "1"
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
    # Orbax writes these two when the sums are there, and no data into them.
    stamps = {"_CHECKPOINT_METADATA", "commit_success.txt"}
    assert {n: d for n, d in found.items() if n not in {"SHA256SUMS", *stamps}} == sums
    assert any(name.startswith("state/") for name in sums)
    assert checksums.damage(folder) is None


def flip(folder: pathlib.Path) -> None:
    content = bytearray(largest(folder).read_bytes())
    content[100] ^= 4
    largest(folder).write_bytes(content)


def truncate(folder: pathlib.Path) -> None:
    largest(folder).write_bytes(largest(folder).read_bytes()[:-1])


def empty(folder: pathlib.Path) -> None:
    largest(folder).write_bytes(b"")


def remove(folder: pathlib.Path) -> None:
    largest(folder).unlink()


def remove_sums(folder: pathlib.Path) -> None:
    (folder / "SHA256SUMS").unlink()


def shorten_sums(folder: pathlib.Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(lines[:-1]))


def cut_stamp(folder: pathlib.Path) -> None:
    (folder / "_CHECKPOINT_METADATA").write_text("{")


@pytest.mark.parametrize(
    ("harm", "found"),
    [
        (flip, "is not as it was written"),
        (truncate, "is not as it was written"),
        (empty, "is not as it was written"),
        (remove, "is missing"),
        (remove_sums, "SHA256SUMS is missing"),
        (shorten_sums, "SHA256SUMS lacks state/"),
        (cut_stamp, "_CHECKPOINT_METADATA is missing or damaged"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture,
    harm: Callable[[pathlib.Path], None],
    found: str,
) -> None:
    save(tmp_path, {2: None, 4: None})
    harm(tmp_path / "4")
    capsys.readouterr()

    checkpoints = Checkpoints(tmp_path, writer=True)
    assert checkpoints.latest_step() == 2
    contents = checkpoints.load(state(0), 2)
    np.testing.assert_array_equal(contents["state"].params["w"], np.arange(3000.0) + 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / '4'}: ")
    assert found in line
    assert line.endswith("set aside as damaged-4, the one before it is used")
    checkpoints.save(state(4), {"batch": 4})
    checkpoints.close()
    assert kept(tmp_path) == ["2", "4", "damaged-4"]
    assert checksums.damage(tmp_path / "4") is None


def test_where_all_are_damaged_the_stage_starts_anew(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path, {2: None, 4: None})
    for name in ("2", "4"):
        flip(tmp_path / name)
    checkpoints = Checkpoints(tmp_path, writer=True)
    assert checkpoints.latest_step() is None
    checkpoints.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("set aside as damaged-4, the one before it is used")
    assert second.endswith("set aside as damaged-2, the stage starts anew")
    assert not checkpoint.has_checkpoint(tmp_path)


def test_an_older_one_that_was_half_removed_is_set_aside_too(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    save(tmp_path, {2: None, 4: None})
    remove(tmp_path / "2")
    checkpoints = Checkpoints(tmp_path, writer=True)
    assert checkpoints.latest_step() == 4
    checkpoints.close()
    assert kept(tmp_path) == ["4", "damaged-2"]
    assert capsys.readouterr().out.endswith("is missing: set aside as damaged-2\n")


def test_what_was_half_saved_is_removed(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {2: None})
    (tmp_path / "4.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, writer=True)
    checkpoints.save(state(4), {"batch": 4})
    checkpoints.close()
    assert kept(tmp_path) == ["2", "4"]
    assert checksums.damage(tmp_path / "4") is None


def test_a_damaged_best_checkpoint_is_refused(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {2: 0.9, 4: 0.1})
    variables, record = checkpoint.load_variables(tmp_path, state(0), "best")
    assert variables.keys() == {"params", "counters"}
    np.testing.assert_array_equal(variables["params"]["w"], np.arange(3000.0) + 2)
    assert variables["counters"]["seen"] == 4
    assert record == {"score": 0.9, "step": 2}
    for keep in ("last", 4):
        variables, record = checkpoint.load_variables(tmp_path, state(0), keep)
        np.testing.assert_array_equal(variables["params"]["w"], np.arange(3000.0) + 4)
        assert record == {"score": 0.1, "step": 4}
    assert checkpoint.newest_and_chosen(tmp_path, "best") == (4, 2)
    assert checkpoint.newest_and_chosen(tmp_path, "last") == (4, 4)
    flip(tmp_path / "2")
    with pytest.raises(InputError, match=r"/2: state/.* is not as it was written, and it is the"):
        checkpoint.load_variables(tmp_path, state(0), "best")


def test_names_that_are_no_steps_are_left_alone(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {1: 0.5, 2: 0.6})
    # Decimals of another script, zeros before, a sign: numbers to Python.
    for name in ("٣", "007", "+4", "notes", "5.bak", "damaged-1"):
        (tmp_path / name).mkdir()
    (tmp_path / "readme").write_text("mine")
    before = kept(tmp_path)
    checkpoints = Checkpoints(tmp_path, writer=True)
    assert checkpoints.latest_step() == 2
    checkpoints.close()
    assert kept(tmp_path) == before


def test_a_checkpoint_of_another_network_is_named(tmp_path: pathlib.Path) -> None:
    save(tmp_path, {1: 0.5})
    whole = state(0)
    others = [
        dataclasses.replace(whole, params={"w": whole.params["w"][:10]}),
        dataclasses.replace(whole, params={"v": whole.params["w"]}),
        dataclasses.replace(whole, carried={}),
    ]
    with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
        for other in others:
            with pytest.raises(InputError, match=r"/1: not a checkpoint of this network") as found:
                checkpoints.load(other, 1)
            assert "\n" not in str(found.value)
