"""One place for exit codes: the table in docs/ and the scripts in launch/ say what it says."""

import pathlib
import re
import shlex

import pytest

from deepsc_jax.runtime import exit_codes

ROOT = pathlib.Path(__file__).parents[2]
CODES = {name: code for name, code in vars(exit_codes).items() if isinstance(code, int)}
NAMES = {code: name for name, code in CODES.items() if name != "MOST_RESTARTS"}


def table() -> list[tuple[int, str, str]]:
    """The rows of docs/exit-codes.md: code, name, and whether it is started again."""
    text = (ROOT / "docs/exit-codes.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \| .* \| ([\w ]+) \|$", text, re.MULTILINE)
    return [(int(code), name, again) for code, name, again in rows]


def test_no_two_codes_are_the_same() -> None:
    assert len(NAMES) == len(CODES) - 1


def test_the_table_holds_every_code_and_says_what_is_started_again() -> None:
    assert [(code, name) for code, name, _ in table()] == sorted(NAMES.items())
    for code, _, again in table():
        most = exit_codes.MOST_RESTARTS
        found = [exit_codes.requeued(code, restarts) for restarts in (0, most - 1, most, 99)]
        assert (
            found
            == {
                "always": [True] * 4,
                f"at most {most}": [True, True, False, False],
                "no": [False] * 4,
            }[again]
        )


def cases(script: str) -> dict[str, set[int]]:
    """Which codes the script's `case` has before each of its actions."""
    text = (ROOT / "launch" / script).read_text("utf-8")
    found = re.findall(r"^ *([\d |]+)\) (\w+)=1 ;;.*$", text, re.MULTILINE)
    assert found, f"no case of exit codes in {script}"
    return {action: {int(c) for c in codes.split("|")} for codes, action in found}


@pytest.mark.parametrize("script", ["slurm.sbatch", "predict.sbatch", "tpu.sh"])
def test_the_scripts_start_again_what_the_module_does(script: str) -> None:
    assert cases(script) == {
        "always": set(exit_codes.REQUEUED_ALWAYS),
        "at_most": set(exit_codes.REQUEUED_AT_MOST),
    }
    assigned = dict(
        word.split("=", 1)
        for line in (ROOT / "launch" / script).read_text("utf-8").splitlines()
        if line.startswith("most_restarts=")
        for word in shlex.split(line)
    )
    assert assigned == {"most_restarts": str(exit_codes.MOST_RESTARTS)}
