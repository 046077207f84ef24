"""The arms of `make learns`: each is made once, and their table is of what was kept."""

import json
import pathlib
from typing import Any

import pytest
from absl import flags
from fresh_flags import REPOSITORY, parse

from deepsc_jax.models.deepsc import arms

DSC = {"default": 0.5, "wide": 0.7}


class Programs:
    """Stand-ins for the commands, which keep what they were asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, module: str, *arguments: str) -> None:
        self.asked.append((module, *arguments))
        given = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--"))
        out = pathlib.Path(given.get("out", "."))
        if module == "prepare":
            (out / "store").mkdir(parents=True)
        if module == "evaluate":
            out.mkdir(parents=True)
            dsc = DSC.get(out.name.partition("-")[0], 0.6)
            curve = {"dsc": [dsc - 0.1, dsc, 0.2], "false_ml": [300.0, 200.0, 50.0]}
            lesions = {"dsc": {"mean": dsc}, "nsd": {"mean": 0.4}}
            (out / "metrics.json").write_text(json.dumps({"curve": curve, "lesions": lesions}))
            rows = [{"case": f"c{i}", "dsc": dsc + i / 100} for i in range(5)] + [{"case": "free"}]
            (out / "scans.json").write_text(json.dumps(rows))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> Programs:
    stand_in = Programs()
    monkeypatch.setattr(arms, "program", stand_in)
    given = flags.FlagValues()
    monkeypatch.setattr(flags, "FLAGS", given)
    flags.DEFINE_string("out", str(tmp_path), "", flag_values=given)
    flags.DEFINE_list("only", ["default", "wide", "fine"], "", flag_values=given)
    flags.DEFINE_list("seeds", ["0"], "", flag_values=given)
    flags.DEFINE_integer("steps", 600, "", flag_values=given)
    flags.DEFINE_string("phantoms", "6,3,3", "", flag_values=given)
    given.mark_as_parsed()
    return stand_in


def test_each_run_is_made_once_and_a_store_for_each_preprocessing(
    programs: Programs, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    arms.main()
    modules = [asked[0] for asked in programs.asked]
    assert modules == ["prepare", *("train", "evaluate") * 2, "prepare", "train", "evaluate"]
    assert any(a.startswith("--cases=") for a in programs.asked[5])
    rows = json.loads((tmp_path / "arms.json").read_text())["arms"]
    assert [row["arm"] for row in rows] == ["default", "wide", "fine"]
    assert [row["best_dsc"] for row in rows] == [0.5, 0.7, 0.6]
    assert [row["dsc_at_250_ml"] for row in rows] == [0.5, 0.7, 0.6]
    assert [row["dsc_at_160_ml"] for row in rows] == [0.2, 0.2, 0.2]
    assert "difference" not in rows[0]
    assert rows[1]["difference"] == pytest.approx([0.2, 0.2, 0.2])
    assert (tmp_path / "arms.png").stat().st_size > 1000
    assert "DSC +0.200 (+0.200 to +0.200)" in capsys.readouterr().out
    programs.asked.clear()
    arms.main()
    assert programs.asked == []


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_is_of_flags_that_train_takes(name: str, monkeypatch: Any) -> None:
    monkeypatch.chdir(REPOSITORY)
    arm = arms.ARMS[name]
    config, _ = parse(arms.SETTINGS, *arm.data, *arm.train)
    plain, _ = parse(arms.SETTINGS)
    assert (config != plain) == bool(arm.data or arm.train)
