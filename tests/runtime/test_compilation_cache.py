"""What XLA compiled is whole or absent on disk, checked when it is read, and bounded."""

import os
import pathlib
import subprocess
import sys
import time
import zlib

import pytest

from deepsc_jax.runtime.compilation_cache import CompilationCache

PROGRAM = """
import jax
from deepsc_jax.runtime import entry

def main():
    said = []
    jax.monitoring.register_event_listener(lambda name, **_: said.append(name.rpartition("/")[2]))
    print(jax.jit(lambda x: x * 3 + 1)(2))
    print("hits", said.count("cache_hits"), "misses", said.count("cache_misses"))

entry.run(main, lambda: None)
"""


def run(folder: pathlib.Path) -> tuple[str, str]:
    """What a program that compiles one function says of its cache, and its errors."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=clean | {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    )
    first, counts = done.stdout.splitlines()
    assert first == "7"
    return counts, done.stderr


def test_a_cut_entry_is_replaced_with_one_line(tmp_path: pathlib.Path) -> None:
    counts, _ = run(tmp_path)
    assert counts.startswith("hits 0 ")
    (path,) = tmp_path.glob("jit__lambda*-cache")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    counts, errors = run(tmp_path)
    assert errors == f"{path}: a damaged compiled program: removed, compiled anew\n"
    assert counts.endswith("misses 1")
    counts, errors = run(tmp_path)
    assert (counts.endswith("misses 0"), errors) == (True, "")


def test_every_flipped_byte_and_every_cut_is_found(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    cache = CompilationCache(tmp_path)
    program = bytes(range(256)) * 2
    value = zlib.compress(program)
    path = tmp_path / "key-cache"
    cache.put("key", value)
    whole = path.read_bytes()
    for at in range(len(whole)):
        flipped = whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :]
        for damaged in (flipped, whole[:at]):
            path.write_bytes(damaged)
            found = cache.get("key")
            if at < len(value):
                assert found is None
                assert not path.exists()
            else:  # where only the sum's mark is damaged, the program need not be
                assert found is None or zlib.decompress(found) == program
    cache.put("key", value)
    assert cache.get("key") == value
    assert "a damaged compiled program: removed" in capsys.readouterr().err


def test_what_jax_wrote_itself_is_read(tmp_path: pathlib.Path) -> None:
    value = zlib.compress(b"a program")
    (tmp_path / "key-cache").write_bytes(value)
    assert CompilationCache(tmp_path).get("key") == value


def test_the_least_recently_used_go_first(tmp_path: pathlib.Path) -> None:
    cache = CompilationCache(tmp_path, most_bytes=3 * (100 + 39))
    for i, key in enumerate("abc"):
        cache.put(key, bytes(100))
        os.utime(tmp_path / f"{key}-cache", (i, i))
    assert cache.get("a") is not None  # used just now
    cache.put("d", bytes(100))
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["a", "c", "d"]
    cache.put("e", bytes(1000))  # more than all together
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == ["a", "c", "d"]


def test_a_folder_that_cannot_be_written_is_said_once(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "below", pathlib.Path("/proc/nothing")):
        cache = CompilationCache(folder)
        for key in "abc":
            cache.put(key, b"a program")
            assert cache.get(key) is None
        said = capsys.readouterr().err
        assert len([line for line in said.splitlines() if "cannot be kept here" in line]) == 1


def test_a_full_disk_is_said_once_and_leaves_nothing_behind(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    cache = CompilationCache(tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    for key in "abc":
        cache.put(key, b"a program")
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "cannot be kept here (No space left on device)" in said
    assert not any(tmp_path.iterdir())


def test_what_a_killed_process_left_goes_after_an_hour(tmp_path: pathlib.Path) -> None:
    old, new = tmp_path / "partial-00", tmp_path / "partial-01"
    for path in (old, new):
        path.write_bytes(b"half a program")
    os.utime(old, (time.time() - 4000, time.time() - 4000))
    CompilationCache(tmp_path, None).put("a", b"a program")
    assert {path.name for path in tmp_path.iterdir()} == {"a-cache", "partial-01"}


def test_entries_that_cannot_be_read_are_said_once(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    cache = CompilationCache(tmp_path)
    for key in "abc":
        (tmp_path / f"{key}-cache").mkdir()
        assert cache.get(key) is None
    assert capsys.readouterr().err.count("cannot be read (Is a directory)") == 1
