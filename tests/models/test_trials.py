"""What `make learns` and `make claims` share: whose result a file is, and what is refused."""

import json
import pathlib
from typing import Any

import pytest
import test_claims
from absl import flags
from fresh_flags import REPOSITORY

from deepsc_jax.models import claims, trials
from deepsc_jax.models.deepsc import arms
from deepsc_jax.runtime.errors import InputError


@pytest.fixture(params=[arms, claims], ids=["arms", "claims"])
def command(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command, whose programs must not be called."""
    monkeypatch.setattr(request.param, "program", lambda *_: pytest.fail("a program was called"))
    return request.param


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> flags.FlagValues:
    """The flags of both commands."""
    values = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", values)
    flags.DEFINE_string("out", str(tmp_path), "", flag_values=values)
    flags.DEFINE_list("only", [], "", flag_values=values)
    flags.DEFINE_list("seeds", ["0"], "", flag_values=values)
    flags.DEFINE_integer("steps", 600, "", flag_values=values)
    flags.DEFINE_string("phantoms", "6,3,3", "", flag_values=values)
    flags.DEFINE_list("more", [], "", flag_values=values)
    values.mark_as_parsed()
    return values


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("only", ["other"], "--only=other"),
        ("seeds", ["0", "x"], "--seeds=x"),
        ("seeds", [], "--seeds="),
    ],
)
def test_what_is_not_there_is_said(
    command: Any, given: flags.FlagValues, flag: str, value: list[str], said: str
) -> None:
    setattr(given, flag, value)
    with pytest.raises(InputError, match=said):
        command.main()


def test_a_result_is_of_the_flags_that_a_flag_file_has_now(tmp_path: pathlib.Path) -> None:
    file, of_flags = tmp_path / "default-0.json", tmp_path / "some.flags"

    def asked(*train: str) -> Any:
        return trials.settings([f"--flagfile={of_flags}"], train, "6,3,3")

    of_flags.write_text("--tile=8,8,8\n")
    settings = asked("--seed=0")
    assert settings["flags"] == ["--tile=8,8,8", "--seed=0"]
    file.write_text(json.dumps({"settings": settings, "dsc": 0.5}))
    assert trials.kept(file, asked("--seed=0"), ["dsc"])["dsc"] == 0.5
    for other in (asked("--seed=1"), {**settings, "phantoms": "9,3,3"}):
        with pytest.raises(InputError, match=r"default-0\.json: made with other settings"):
            trials.kept(file, other, ["dsc"])
    with pytest.raises(InputError, match="made with other settings"):
        trials.kept(file, settings, ["dsc", "nsd"])
    of_flags.write_text("--tile=16,16,16\n")
    with pytest.raises(InputError, match="made with other settings"):
        trials.kept(file, asked("--seed=0"), ["dsc"])
    file.write_text("{")
    with pytest.raises(InputError, match="not a run's result"):
        trials.kept(file, settings, ["dsc"])


def test_a_command_takes_no_result_of_other_settings(
    given: flags.FlagValues, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(claims, "program", test_claims.Programs())
    given.only = ["student"]
    claims.main()
    given.more = ["--cnncf.classification.steps=4"]
    with pytest.raises(InputError, match=r"student-0\.json: made with other settings"):
        claims.main()
