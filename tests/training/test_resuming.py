"""What may be another when a run goes on, and what it computes then."""

import dataclasses
import pathlib
from typing import Any, cast

import handful
import jax
import pytest

from deepsc_jax.config import Config, DataConfig, TrainConfig
from deepsc_jax.data.store import Store
from deepsc_jax.inference.predictor import abstract_state
from deepsc_jax.models import registry
from deepsc_jax.models.deepsc.config import Options
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.systems.building import build
from deepsc_jax.training import loop
from deepsc_jax.training import workdir as workdirs
from deepsc_jax.training.checkpoint import Checkpoints
from deepsc_jax.training.resuming import settle

CONFIG = Config(Options(), train=TrainConfig(schedule="constant"))


def trains(config: Config, **changes: Any) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def longer(config: Config = CONFIG, name: str = "joint", by: int = 1) -> Config:
    return config.with_stage(name, steps=config.stage(name).steps + by)


def begun_from(workdir: pathlib.Path, stage: str) -> None:
    """A complete checkpoint of a stage, as far as the names of its files go."""
    (workdir / stage / "4").mkdir(parents=True)


def test_how_often_something_is_written_may_change_and_is_said_in_one_line(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture
) -> None:
    other = trains(CONFIG, log_every=3, cache_mib=0, evaluate_every=7, checkpoint_every=9)
    assert settle(tmp_path, CONFIG, other, longer=True, say=True) == set()
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    for name in ("log_every: 10 then, 3 now", "cache_mib", "evaluate_every", "checkpoint_every"):
        assert f"--{name}" in said
    settle(tmp_path, CONFIG, other, longer=True, say=False)
    assert capsys.readouterr().out == ""


def test_what_changes_a_number_is_refused_by_its_flag_alone(tmp_path: pathlib.Path) -> None:
    other = trains(longer(), log_every=3, seed=1)
    with pytest.raises(InputError) as refused:
        settle(tmp_path, CONFIG, other, longer=True, say=True)
    assert "other settings (--seed: 0 then, 1 now): give another folder" in str(refused.value)


@pytest.mark.parametrize("name", ["segmentation", "joint"])
def test_steps_may_be_added_under_a_constant_rate(tmp_path: pathlib.Path, name: str) -> None:
    assert settle(tmp_path, CONFIG, longer(CONFIG, name), longer=True, say=True) == {name}
    with pytest.raises(InputError, match=rf"--deepsc\.{name}\.steps: 20000 then, 20001 now"):
        settle(tmp_path, CONFIG, longer(CONFIG, name), longer=False, say=True)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (TrainConfig(), "--schedule=linear --warmup_steps=0, and is the same under a constant"),
        (TrainConfig(schedule="cosine"), "--schedule=cosine"),
        (TrainConfig(schedule="constant", warmup_steps=30000), "--warmup_steps=30000"),
    ],
)
def test_no_steps_are_added_where_the_rate_goes_by_their_number(
    tmp_path: pathlib.Path, train: TrainConfig, reason: str
) -> None:
    config = dataclasses.replace(CONFIG, train=train)
    with pytest.raises(InputError, match=rf"20000 then, 20001 now: the learning rate .*{reason}"):
        settle(tmp_path, config, longer(config), longer=True, say=True)


def test_a_short_warm_up_is_the_same_for_more_steps(tmp_path: pathlib.Path) -> None:
    config = trains(CONFIG, warmup_steps=30)
    assert settle(tmp_path, config, longer(config), longer=True, say=True) == {"joint"}


@pytest.mark.parametrize(
    ("name", "stage", "data"),
    [
        ("qchc_unet", "segmentation", DataConfig(mask="none")),
        ("cnncf", "classification", DataConfig(slices=3)),
    ],
)
def test_a_rate_that_goes_by_no_schedule_takes_more_steps(
    tmp_path: pathlib.Path, name: str, stage: str, data: DataConfig
) -> None:
    config = Config(registry.options(name)(), data)
    assert settle(tmp_path, config, longer(config, stage), longer=True, say=True) == {stage}


def test_steps_are_not_taken_away(tmp_path: pathlib.Path) -> None:
    with pytest.raises(InputError, match="20000 then, 19999 now: steps can be added and not taken"):
        settle(tmp_path, CONFIG, longer(by=-1), longer=True, say=True)


def test_a_stage_from_which_another_has_started_is_not_changed(tmp_path: pathlib.Path) -> None:
    begun_from(tmp_path, "joint")
    with pytest.raises(InputError, match="stage joint has started from what it was"):
        settle(tmp_path, CONFIG, longer(CONFIG, "segmentation"), longer=True, say=True)
    assert settle(tmp_path, CONFIG, longer(), longer=True, say=True) == {"joint"}


@pytest.mark.slow
def test_a_finished_run_with_more_steps_ends_as_one_that_had_them_all_along(
    tmp_path: pathlib.Path,
) -> None:
    folder = handful.write(tmp_path / "data")
    store = Store(folder / "store", handful.CONFIG.data)
    whole = trains(handful.CONFIG.with_stage("classification", steps=4), schedule="constant")
    half = trains(whole.with_stage("classification", steps=2), log_every=2, checkpoint_every=4)
    system = build(whole, "cpu")
    stage = system.stage("classification")
    for name, configs in (("straight", [whole]), ("added", [half, whole])):
        for config in configs:
            workdirs.begin(tmp_path / name, config, cast(Store, store), longer=True)
            of_run = build(config, "cpu")
            loop.train(of_run, store, tmp_path / name, [of_run.stage("classification")])
            workdirs.save_threshold(tmp_path / name, "classification", 0.5)
    states = []
    for name in ("straight", "added"):
        checkpoints = Checkpoints(tmp_path / name / "classification")
        assert checkpoints.latest_step() == 4
        states.append(checkpoints.load(abstract_state(system, stage), 4)["state"])
        checkpoints.close()
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), *states)))


def test_a_threshold_of_a_stage_with_more_steps_is_chosen_anew(tmp_path: pathlib.Path) -> None:
    class NoScans:
        digest, contents, path = "a1", "phantoms", "data/store"

        def cases(self, split: str) -> list[Any]:
            assert split == "train"
            return []

    for stage in ("segmentation", "joint"):
        workdirs.begin(tmp_path, CONFIG, cast(Store, NoScans()), longer=True)
        workdirs.save_threshold(tmp_path, stage, 0.3)
    workdirs.begin(tmp_path, longer(), cast(Store, NoScans()), longer=True)
    assert workdirs.read(tmp_path).thresholds == {"segmentation": 0.3}
