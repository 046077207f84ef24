"""The arms of `make claims`: each is made once, and is compared with what it is claimed to beat."""

import json
import pathlib
from typing import Any

import pytest
from absl import flags
from fresh_flags import REPOSITORY, parse

from deepsc_jax.models import claims

HEAD = "case,patient,split,label,scan,lesion_mask,lung_mask\n"
# Four X-rays of two patients, whose probabilities order them wholly, or but for one pair of four.
RIGHT = {"p0-a": 0.9, "p0-b": 0.8, "p1-a": 0.3, "p1-b": 0.2}
WRONG = RIGHT | {"p0-b": 0.25}


class Programs:
    """Stand-ins for the commands, which keep what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, module: str, *arguments: str) -> None:
        self.asked.append((module, *arguments))
        given = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--"))
        out = pathlib.Path(given.get("out", "."))
        out.mkdir(parents=True, exist_ok=True)
        if module == "prepare":
            (out / "store").mkdir()
            rows = [
                f"{name},{name[:2]},test,{'cap' if name[1] == '1' else 'covid-19'},{name}.png,,\n"
                for name in RIGHT
            ]
            (out / "cases.csv").write_text(HEAD + "".join(rows))
        if module != "evaluate":
            return
        (out / "metrics.json").write_text("{}")
        network = given["checkpoint"].rpartition("/")[2]
        found: dict[str, Any] = WRONG if network.startswith("student") else RIGHT
        if "stage" in given and given["stage"].endswith("fold2"):
            found = {name: 1 - p for name, p in RIGHT.items()}
        rows = [
            {"case": name, "probabilities": {"covid-19": p, "cap": 1 - p}, "dsc": p}
            for name, p in found.items()
        ]
        (out / "scans.json").write_text(json.dumps(rows))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Programs:
    stand_in = Programs()
    monkeypatch.setattr(claims, "program", stand_in)
    given = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", given)
    flags.DEFINE_string("out", str(tmp_path), "", flag_values=given)
    flags.DEFINE_list("only", ["student", "taught"], "", flag_values=given)
    flags.DEFINE_list("seeds", ["0", "1"], "", flag_values=given)
    flags.DEFINE_string("phantoms", "6,3,3", "", flag_values=given)
    flags.DEFINE_list("more", [], "", flag_values=given)
    given.mark_as_parsed()
    return stand_in


def test_a_student_stands_beside_its_teachers_and_the_one_without(
    programs: Programs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    claims.main()
    modules = [asked[0] for asked in programs.asked]
    assert modules == ["prepare", *("train", "evaluate") * 2, "train", *("evaluate",) * 21]
    stages = [a for asked in programs.asked for a in asked if a.startswith("--stage=")]
    assert stages[6] == "--stage=teacher2.fold2"
    alone, taught = json.loads((tmp_path / "claims.json").read_text())["arms"]
    # Of the pairs of a positive and a negative three of four are in order.
    assert (alone["mean"], alone["of_seeds"]) == (0.75, [0.75, 0.75])
    assert "difference" not in alone
    assert (taught["mean"], taught["seeds"]) == (1.0, ["0"])
    assert taught["against"] == "student"
    # Of two patients one is positive: no resample that has a figure is another than all of them.
    assert taught["difference"] == pytest.approx([0.25, 0.25, 0.25])
    assert taught["teachers"]["mean"] == 1.0  # four of five folds are right
    said = capsys.readouterr().out
    assert "+0.250 (+0.250 to +0.250) against student" in said
    assert "its teachers, fused" in said
    programs.asked.clear()
    claims.main()
    assert programs.asked == []


def test_arms_of_lesions_are_compared_by_their_dsc(
    programs: Programs, tmp_path: pathlib.Path
) -> None:
    flags.FLAGS.only = ["qchc", "no_hypercolumns"]
    claims.main()
    _, off = json.loads((tmp_path / "claims.json").read_text())["arms"]
    assert (off["figure"], off["mean"], off["seeds"]) == ("dsc", pytest.approx(0.55), ["0", "1"])
    assert off["difference"] == [0, 0, 0]


@pytest.mark.parametrize("name", claims.ARMS)
def test_every_arm_is_of_flags_that_train_takes(name: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(REPOSITORY)
    arm = claims.ARMS[name]
    data = claims.TASKS[arm.task].data
    config, _ = parse(*data, *arm.train)
    plain, _ = parse(*data)
    assert (config != plain) == bool(arm.train)
    assert not arm.against or claims.ARMS[arm.against].task == arm.task
