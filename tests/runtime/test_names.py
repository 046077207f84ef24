"""Names of users' files as text: one line, nothing hidden, never an error."""

import os
import pathlib
import subprocess
import sys

import pytest

from deepsc_jax.runtime.names import cell, counted, print_any_name, shown

NAMES = {
    b"scan_01.nii.gz": "scan_01.nii.gz",
    "病人 3 – größe.nii".encode(): "病人 3 – größe.nii",
    "größe.nii".encode("latin-1"): r"gr\xf6\xdfe.nii",
    b"a\nb\r\tc.nii": r"a\nb\r\tc.nii",
    b"\x1b[2J\x07.nii": r"\x1b[2J\x07.nii",
    "a\u202eiin.exe".encode(): r"a\u202eiin.exe",
    "line\u2028break\u0085".encode(): r"line\u2028break\x85",
    "wide\u3000blank\u00a0".encode(): "wide\u3000blank\u00a0",
    b"back\\n$_$": "back\\n$_$",
    "🫁.nii".encode(): "🫁.nii",
}


@pytest.mark.parametrize(("name", "text"), NAMES.items())
def test_what_cannot_be_seen_is_escaped_and_all_else_stays(name: bytes, text: str) -> None:
    assert shown(name) == text
    assert shown(os.fsdecode(name)) == text
    assert shown(pathlib.Path(os.fsdecode(name))) == text
    assert shown(text) == text
    assert len(text.splitlines()) == 1
    text.encode("utf-8")


def test_every_character_is_shown_as_one_line_of_utf8() -> None:
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    text = shown(every)
    assert len(text.splitlines()) == 1
    assert text.encode("utf-8").decode("utf-8") == text
    assert shown(text) == text


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "＝"])
def test_a_cell_is_no_formula(start: str) -> None:
    assert cell(f"{start}cmd|' /C calc'!A0") == f"'{start}cmd|' /C calc'!A0"


def test_one_is_no_plural() -> None:
    assert [counted(n, "file") for n in (0, 1, 2)] == ["0 files", "1 file", "2 files"]


def test_other_cells_stay() -> None:
    assert cell("a=b") == "a=b"
    assert cell("\t=b") == r"\t=b"  # what is escaped begins with a backslash


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_printing_a_name_is_never_an_error(encoding: str) -> None:
    code = (
        "import sys; from deepsc_jax.runtime import names; names.print_any_name();"
        "print('病人', chr(0xdce9)); print('größe', chr(0xdce9), file=sys.stderr)"
    )
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    )
    expected = "病人 \udce9".encode(encoding, "backslashreplace")
    assert done.stdout.rstrip() == expected
    assert done.stderr.rstrip() == "größe \udce9".encode(encoding, "backslashreplace")


def test_streams_that_are_no_text_wrapper_are_left_alone(
    capsys: pytest.CaptureFixture[str],
) -> None:
    print_any_name()
    print("x")
    assert capsys.readouterr().out == "x\n"
