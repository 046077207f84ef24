"""What a run's folder says of itself."""

import dataclasses
import json
import os
import pathlib
import types
from typing import Any, cast

import pytest

from deepsc_jax.config import Config, DataConfig, PlatformConfig, TrainConfig
from deepsc_jax.data.store import Store
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.training import workdir as workdirs

CONFIG = Config(Options())


@dataclasses.dataclass
class FakeStore:
    digest: str = "a1"
    contents: str = "phantoms"
    path: str = "data/store"
    depths: tuple[int, ...] = (70, 40)

    def cases(self, split: str) -> list[Any]:
        assert split == "train"
        return [types.SimpleNamespace(depth=depth) for depth in self.depths]


def begin(workdir: pathlib.Path, config: Config = CONFIG, **facts: Any) -> None:
    workdirs.begin(workdir, config, cast(Store, FakeStore(**facts)))


def test_a_run_knows_what_it_is_trained_on(tmp_path: pathlib.Path):
    begin(tmp_path / "run")
    assert workdirs.read(tmp_path / "run") == workdirs.Record(CONFIG, "phantoms", "a1", {})
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "run.json"}


def test_a_run_goes_on_with_its_thresholds_on_other_devices(tmp_path: pathlib.Path):
    begin(tmp_path)
    workdirs.save_threshold(tmp_path, "joint", 0.35)
    workdirs.save_threshold(tmp_path, "segmentation", 0.15)
    other = dataclasses.replace(CONFIG, platform=PlatformConfig(data_devices=4))
    begin(tmp_path, other)
    record = workdirs.read(tmp_path)
    assert record.thresholds == {"joint": 0.35, "segmentation": 0.15}
    assert record.config == other


@pytest.mark.parametrize(
    ("tile", "depths", "whole"),
    [((64, 64, 96), (64, 40), True), ((64, 64, 96), (65, 40), False), ((64, 64, 48), (40,), False)],
)
def test_a_run_knows_whether_its_tile_held_every_scan(
    tmp_path: pathlib.Path, tile: tuple[int, int, int], depths: tuple[int, ...], whole: bool
):
    data = DataConfig(working_size=(64, 96), tile=tile)
    begin(tmp_path, dataclasses.replace(CONFIG, data=data), depths=depths)
    assert workdirs.read(tmp_path).whole_scans == whole
    facts = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(facts | {"whole_scans": "yes"}))
    with pytest.raises(
        InputError, match=r"run\.json: .*whole_scans is true or false, .*yes.* found"
    ):
        workdirs.read(tmp_path)


def test_other_settings_and_another_store_are_refused(tmp_path: pathlib.Path):
    begin(tmp_path)
    seeded = dataclasses.replace(CONFIG, train=TrainConfig(seed=1))
    with pytest.raises(
        InputError, match=r"config\.json: .* other settings \(--seed: 0 then, 1 now\)"
    ):
        begin(tmp_path, seeded)
    with pytest.raises(InputError, match=r"run\.json: .* another store than data/store"):
        begin(tmp_path, digest="b2")


def test_a_run_with_local_batch_norms_goes_on_with_as_many_devices_alone(tmp_path: pathlib.Path):
    def on(devices: int) -> Config:
        platform = PlatformConfig(data_devices=devices)
        return dataclasses.replace(CONFIG, train=TrainConfig(batch_norm="local"), platform=platform)

    begin(tmp_path, on(2))
    facts = json.loads((tmp_path / "run.json").read_text())
    assert facts["batch_norm"] == "local, by the scans of each of 2 devices"
    begin(tmp_path, on(2))
    with pytest.raises(InputError, match=r"run\.json: .* each of 2 devices, .* each of 4 devices"):
        begin(tmp_path, on(4))


@pytest.mark.parametrize("text", ["[]", "{", json.dumps({"trained_on": "phantoms", "store": "a1"})])
def test_a_damaged_record_is_named(tmp_path: pathlib.Path, text: str):
    begin(tmp_path)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=r"run\.json: not the record of a run"):
        workdirs.read(tmp_path)


def test_a_record_that_is_no_file_is_named_and_not_waited_for(tmp_path: pathlib.Path):
    begin(tmp_path)
    (tmp_path / "run.json").unlink()
    os.mkfifo(tmp_path / "run.json")
    with pytest.raises(InputError, match=r"run\.json: not the record of a run"):
        workdirs.read(tmp_path)


def test_a_folder_without_a_run_is_named(tmp_path: pathlib.Path):
    with pytest.raises(InputError, match=r"no config\.json found: give --checkpoint"):
        workdirs.read(tmp_path)


def test_checkpoints_without_what_says_of_which_run_they_are_are_refused(tmp_path: pathlib.Path):
    begin(tmp_path)
    (tmp_path / "joint" / "4").mkdir(parents=True)
    (tmp_path / "joint" / "4" / "SHA256SUMS").touch()
    begin(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match=r"checkpoints of joint, and no config\.json"):
        begin(tmp_path)
    assert not (tmp_path / "config.json").exists()
