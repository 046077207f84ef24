"""Files and folders appear whole or not at all, and never in place of a user's own."""

import errno
import json
import os
import pathlib
import stat
import subprocess
import sys
import tempfile
from collections.abc import Collection

import pytest

from deepsc_jax.runtime import files
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import aside, folder_aside, own, put_back, require_own, write_json


def names(folder: pathlib.Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def stop_halfway(path: pathlib.Path) -> None:
    path.write_text("half")
    raise OSError("disk full")


def fill(
    path: pathlib.Path, replaces: Collection[str] | None = None, **contents: str
) -> pathlib.Path:
    """A folder of files by name, in place of the files `replaces` of an earlier one."""
    ours = None if replaces is None else lambda _: replaces
    with folder_aside(path, ours) as partial:
        for name, content in contents.items():
            (partial / name).write_text(content)
    return path


def test_a_file_that_fails_leaves_the_earlier_one(tmp_path: pathlib.Path):
    path = tmp_path / "a.txt"
    with aside(path) as partial:
        partial.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(OSError, match="disk full"), aside(path) as partial:
        stop_halfway(partial)
    assert path.read_text() == "first"
    assert names(tmp_path) == {"a.txt"}


def test_a_link_at_the_name_is_replaced_and_not_followed(tmp_path: pathlib.Path):
    target, path = tmp_path / "target", tmp_path / "a.txt"
    target.write_text("a user's own")
    path.symlink_to(target)
    with aside(path) as partial:
        partial.write_text("new")
    assert (path.is_symlink(), path.read_text()) == (False, "new")
    assert target.read_text() == "a user's own"


def test_a_planted_partial_file_is_not_written_to(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    target = tmp_path / "target"
    target.write_text("a user's own")
    monkeypatch.setattr(files.secrets, "token_hex", lambda _: "01234567")  # a guess that is right
    (tmp_path / ".partial-01234567-a.txt").symlink_to(target)
    with pytest.raises(FileExistsError), aside(tmp_path / "a.txt") as partial:
        partial.write_text("new")
    assert target.read_text() == "a user's own"
    assert names(tmp_path) == {"target", ".partial-01234567-a.txt"}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_leaves(tmp_path: pathlib.Path, umask: int, mode: int):
    before = os.umask(umask)
    try:
        write_json({}, tmp_path / "a.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == mode


def test_the_longest_names_can_be_written(tmp_path: pathlib.Path):
    path = tmp_path / ("ü" * 124 + ".nii.gz")  # 255 bytes
    with aside(path) as partial:
        assert partial.name.endswith(".nii.gz")
        partial.write_text("new")
    folder = fill(tmp_path / ("b" * 255), x="first")
    assert names(fill(folder, ["x"], y="second")) == {"y"}
    assert names(tmp_path) == {path.name, folder.name}


def test_a_rename_that_was_done_though_it_failed_is_done(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    replace = os.replace

    def answer_lost(source: pathlib.Path, target: pathlib.Path) -> None:
        replace(source, target)
        replace(source, target)  # sent again by an NFS client

    monkeypatch.setattr(os, "replace", answer_lost)
    write_json({"a": 1}, tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_folder_that_fails_leaves_the_earlier_one(tmp_path: pathlib.Path):
    path = fill(tmp_path / "a", x="first")
    with pytest.raises(OSError, match="disk full"), folder_aside(path, lambda _: ["x"]) as partial:
        stop_halfway(partial / "y")
    assert names(path) == {"x"}
    assert names(fill(path, ["x"], z="second")) == {"z"}
    assert names(tmp_path) == {"a"}


def test_what_others_put_into_a_folder_is_carried_over(tmp_path: pathlib.Path):
    path = fill(tmp_path / "a", x="first", y="first")
    (path / "notes.txt").write_text("mine")
    (path / "sub" / "deep").mkdir(parents=True)
    (path / "sub" / "deep" / "z").write_text("mine")
    (path / "sub" / "here").symlink_to("deep")
    (path / "link").symlink_to("nowhere")
    (path / "empty").mkdir()
    fill(path, ["x", "y"], x="second")
    assert names(path) == {"x", "notes.txt", "sub", "link", "empty"}
    assert (path / "x").read_text() == "second"
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "sub" / "here" / "z").read_text() == "mine"
    assert os.readlink(path / "link") == "nowhere"
    assert names(tmp_path) == {"a"}


def test_without_hard_links_it_is_copied(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    path = fill(tmp_path / "a", x="first")
    (path / "notes.txt").write_text("mine")
    assert names(fill(path, ["x"], y="second")) == {"y", "notes.txt"}
    assert names(tmp_path) == {"a"}


def test_a_file_of_others_is_not_replaced(tmp_path: pathlib.Path):
    path = fill(tmp_path / "a", x="first")
    (path / "y").write_text("mine")
    with pytest.raises(FileExistsError, match="was not written here"):
        fill(path, ["x"], y="second")
    with pytest.raises(OSError, match="not empty"):
        fill(path, None, x="second")
    assert (path / "x").read_text() == "first"
    assert (path / "y").read_text() == "mine"
    (tmp_path / "b").write_text("a file")
    with pytest.raises(OSError, match="no folder"):
        fill(tmp_path / "b", [], x="second")
    assert (tmp_path / "b").read_text() == "a file"
    assert names(tmp_path) == {"a", "b"}


def test_of_two_that_fill_a_folder_at_once_one_stays_whole(tmp_path: pathlib.Path):
    path = tmp_path / "a"
    left = tmp_path / ".partial-01234567-a"  # by a process that was killed
    other = tmp_path / ".partial-01234567-b-a"  # another folder's
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


KILLED = """
import os, pathlib, sys
from deepsc_jax.runtime.files import folder_aside

path, renames, replace = pathlib.Path(sys.argv[1]), int(sys.argv[2]), os.replace

def replace_or_die(source, target):
    global renames
    try:
        replace(source, target)
    finally:
        renames -= 1
        if renames < 0:
            os.kill(os.getpid(), 9)

os.replace = replace_or_die
with folder_aside(path, lambda _: ["x"]) as partial:
    (partial / "x").write_text("second")
"""


# Of the new folder (fails: the earlier is there), of the earlier one, of the new one.
@pytest.mark.parametrize("renames", [0, 1, 2])
def test_killed_after_any_of_its_renames_nothing_is_lost(tmp_path: pathlib.Path, renames: int):
    path = fill(tmp_path / "a", x="first")
    (path / "notes.txt").write_text("mine")
    killed = subprocess.run([sys.executable, "-c", KILLED, path, str(renames)], check=False)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 2
    assert path.exists() == (renames != 1)
    put_back(path)
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "x").read_text() == ("second" if renames == 2 else "first")
    fill(path, ["x"], x="third")
    assert (path / "x").read_text() == "third"
    assert (path / "notes.txt").read_text() == "mine"
    assert names(path) == {"x", "notes.txt"}
    assert names(tmp_path) == {"a"}


def test_a_file_is_replaced_while_it_is_as_it_was_written(tmp_path: pathlib.Path):
    path = tmp_path / "table.csv"
    for content in ("first", "second"):
        with own(path) as partial:
            partial.write_text(content)
        assert path.read_text() == content
        check = ["sha256sum", "--check", "--strict", f"{path.name}.sha256"]
        assert subprocess.run(check, cwd=tmp_path, capture_output=True).returncode == 0
    assert require_own(path) is not None
    path.write_text("corrected by hand")
    with pytest.raises(InputError, match=r"table\.csv: was not written here or has been changed"):
        require_own(path)
    with pytest.raises(InputError), own(path) as partial:
        partial.write_text("third")
    assert path.read_text() == "corrected by hand"
    path.unlink()
    with own(path) as partial:
        partial.write_text("fourth")
    assert path.read_text() == "fourth"


def test_files_of_others_are_not_taken_for_own(tmp_path: pathlib.Path):
    for name in ("foreign", "link", "fifo", "sums"):
        path = tmp_path / f"{name}.csv"
        if name == "foreign":
            path.write_text("name,scan\n")
        elif name == "link":
            path.symlink_to(tmp_path / "foreign.csv")
        elif name == "fifo":
            os.mkfifo(path)
        else:
            (tmp_path / "sums.csv.sha256").write_text("a user's own")
        with pytest.raises(InputError, match="not overwritten"):
            require_own(path)
    assert require_own(tmp_path / "absent.csv") is None


@pytest.mark.parametrize("killed_at", [0, 1, 2])
def test_killed_while_it_is_replaced_a_file_is_still_own(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
):
    path, replace, count = tmp_path / "table.csv", os.replace, iter(range(9))
    with own(path) as partial:
        partial.write_text("first")

    def fail(source: pathlib.Path, target: pathlib.Path) -> None:
        if next(count) == killed_at:
            raise OSError("killed")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="killed"), own(path) as partial:
        partial.write_text("second")
    monkeypatch.undo()
    assert path.read_text() == ("second" if killed_at == 2 else "first")
    with own(path) as partial:
        partial.write_text("third")
    assert path.read_text() == "third"


def test_paths_of_options(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.local_path("out", "~/x") == tmp_path / "x"
    assert files.local_path("out", "x~/y") == pathlib.Path("x~/y")
    for text in ("gs://bucket/x", "s3://bucket", "https://host/x"):
        with pytest.raises(InputError, match=f"--out={text}: is an address"):
            files.local_path("out", text)
    with pytest.raises(InputError, match="--out: is empty"):
        files.local_path("out", "")


def test_places_that_cannot_be_written_to(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "locked").mkdir(mode=0o500)
    places = {"file": "there is a file", "file/x": "Not a directory"}
    if os.getuid():  # root may write anywhere
        places |= {"locked": "Permission denied", "locked/x": "Permission denied"}
    if pathlib.Path("/proc/self").exists():
        places |= {"/proc/x": ""}
    for place, reason in places.items():
        with pytest.raises(InputError, match=f"--out: .*{place} cannot be written to .*{reason}"):
            files.require_writable("out", tmp_path / place)
    files.require_writable("out", tmp_path / "new" / "folder")
    assert names(tmp_path / "new" / "folder") == set()


def test_a_full_disk_is_seen_before_the_work(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    full = pathlib.Path("/dev/full")
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full.open("wb"))
    with pytest.raises(InputError, match="No space left on device"):
        files.require_writable("out", tmp_path)


def test_json_is_strict(tmp_path: pathlib.Path):
    path = tmp_path / "a.json"
    write_json({"b": [1, None]}, path)
    assert json.loads(path.read_text()) == {"b": [1, None]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json({"b": float("nan")}, path)
    assert json.loads(path.read_text()) == {"b": [1, None]}
