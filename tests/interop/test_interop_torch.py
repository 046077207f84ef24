"""Weights to PyTorch and back."""

import pathlib
import pickle
from typing import Any

import jax
import numpy as np
import pytest
import torch
from parity_network import CONFIG, changed, draw, system_of
from reference.deepsc.network import DeepSC as Reference

from deepsc_jax.config import Config
from deepsc_jax.inference import predictor as inference
from deepsc_jax.interop import torch as interop
from deepsc_jax.models.deepsc.torch_names import TORCH_NAMES
from deepsc_jax.models.torch_names import Rule
from deepsc_jax.runtime.errors import InputError

ABLATED = changed(CONFIG, model={"inception": "plain", "cross_stitch": False})


@pytest.fixture(scope="module")
def params() -> Any:
    return draw(CONFIG)


def like(config: Config) -> Any:
    """Shapes and types of the network's parameters."""
    return interop.expected(system_of(config))["params"]


def same_bits(one: Any, other: Any) -> bool:
    def equal(a: Any, b: Any) -> bool:
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()

    return all(jax.tree.leaves(jax.tree.map(equal, one, other)))


@pytest.mark.parametrize("suffix", interop.SUFFIXES)
def test_a_round_trip_through_a_file_keeps_every_bit(
    params: Any, suffix: str, tmp_path: pathlib.Path
):
    path = tmp_path / f"weights{suffix}"
    interop.write(interop.to_torch(params, TORCH_NAMES), path)
    found = interop.from_torch(interop.read(path), TORCH_NAMES, like(CONFIG))
    assert same_bits(params, found)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, f"{path.name}.sha256"}


@pytest.mark.parametrize("config", [CONFIG, ABLATED], ids=["default", "ablated"])
def test_the_reference_has_the_names_and_shapes_of_the_table(config: Any):
    weights = interop.to_torch(draw(config), TORCH_NAMES)
    reference = Reference(config)
    reference.load_state_dict(weights, strict=True)
    again = interop.from_torch(reference.state_dict(), TORCH_NAMES, like(config))
    assert same_bits(interop.to_torch(again, TORCH_NAMES), weights)


def test_the_weights_share_no_memory_with_the_parameters(params: Any):
    before = jax.tree.map(np.array, params)
    weights = interop.to_torch(params, TORCH_NAMES)
    for weight in weights.values():
        weight.fill_(7.0)
    assert same_bits(params, before)
    again = interop.from_torch(weights, TORCH_NAMES)
    for weight in weights.values():
        weight.zero_()
    assert all((leaf == 7).all() for leaf in jax.tree.leaves(again))


def test_running_statistics_go_with_the_parameters_both_ways():
    table = (
        Rule("norm{n}/scale", "norms.{n}.weight"),
        Rule("norm{n}/bias", "norms.{n}.bias"),
        Rule("norm{n}/mean", "norms.{n}.running_mean", collection="batch_stats"),
        Rule("norm{n}/var", "norms.{n}.running_var", collection="batch_stats"),
    )
    rows = np.arange(16, dtype=np.float32).reshape(2, 4, 2)
    variables = {
        "params": {f"norm{n}": {"scale": x[0], "bias": x[1]} for n, x in enumerate(rows)},
        "batch_stats": {f"norm{n}": {"mean": x[2], "var": x[3]} for n, x in enumerate(rows)},
    }
    module = torch.nn.Module()
    norms = [torch.nn.BatchNorm3d(2), torch.nn.BatchNorm3d(2)]
    module.norms = torch.nn.ModuleList(norms)
    module.load_state_dict(interop.variables_to_torch(variables, table), strict=True)
    assert norms[1].state_dict()["running_var"].tolist() == [14, 15]
    weights = module.state_dict()
    assert same_bits(interop.variables_from_torch(weights, table, variables), variables)
    del weights["norms.0.running_var"]
    with pytest.raises(InputError, match=r"missing: norms\.0\.running_var:"):
        interop.variables_from_torch(weights, table, variables)


def test_every_name_that_does_not_fit_is_in_the_error(params: Any):
    weights = interop.to_torch(params, TORCH_NAMES)
    del weights["lesion.down1.0.conv.weight"], weights["cross_stitch.weights"]
    weights |= {"head.weight": torch.zeros(1), "lesion.down9.0.norm.bias": torch.zeros(1)}
    weights["classifier.linear.weight"] = torch.zeros(14, 3)
    with pytest.raises(InputError) as caught:
        interop.from_torch(weights, TORCH_NAMES, like(CONFIG))
    text = str(caught.value)
    assert "missing: cross_stitch.weights, lesion.down1.0.conv.weight;" in text
    assert "unexpected: head.weight, lesion.down9.0.norm.bias;" in text
    assert "classifier.linear.weight is (14, 3), expected (3, 14)" in text


def test_names_of_another_network_are_refused():
    weights = {"conv1.weight": torch.zeros(1), "fc.bias": torch.zeros(1)}
    with pytest.raises(InputError, match=r"unexpected names: conv1\.weight, fc\.bias"):
        interop.from_torch(weights, TORCH_NAMES)


def test_weights_of_half_precision_are_refused(params: Any):
    weights = interop.to_torch(params, TORCH_NAMES)
    weights["cross_stitch.weights"] = weights["cross_stitch.weights"].to(torch.bfloat16)
    with pytest.raises(InputError, match=r"cross_stitch.weights is torch.bfloat16 \(1 such\)"):
        interop.from_torch(weights, TORCH_NAMES)


class Runs:
    """Unpickling it would run code."""

    def __reduce__(self) -> Any:
        return print, ("this was run",)


def test_code_in_a_file_is_not_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], params: Any
):
    torch.save({"a": Runs()}, tmp_path / "code.pth")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Runs()))
    for name in ("code.pth", "plain.pth"):
        with pytest.raises(InputError, match=f"{name}: "):
            interop.read(tmp_path / name)
    assert capsys.readouterr().out == ""


def test_unreadable_files_are_named(tmp_path: pathlib.Path):
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 20)
    (tmp_path / "broken.pth").write_bytes(b"PK\3\4")
    (tmp_path / "text.pth").write_text("epoch 3")
    torch.save({"epoch": 3}, tmp_path / "epoch.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    names = [
        "broken.safetensors",
        "broken.pth",
        "text.pth",
        "absent.pth",
        "epoch.pth",
        "list.pth",
        "weights.onnx",
    ]
    for name in names:
        with pytest.raises(InputError, match=name):
            interop.read(tmp_path / name)


@pytest.mark.parametrize("suffix", interop.SUFFIXES)
def test_a_users_file_is_not_replaced_by_weights(tmp_path: pathlib.Path, suffix: str):
    path, weights = tmp_path / f"weights{suffix}", {"a": torch.ones(2)}
    interop.write(weights, path)
    interop.write(weights | {"b": torch.zeros(1)}, path)  # ours is
    assert sorted(interop.read(path)) == ["a", "b"]
    path.write_bytes(b"a user's own")
    with pytest.raises(InputError, match=f"weights{suffix}: was not written here or has been"):
        interop.write(weights, path)
    assert path.read_bytes() == b"a user's own"


def test_a_run_made_from_weights_is_what_predict_reads(params: Any, tmp_path: pathlib.Path):
    workdir = tmp_path / "run"
    system = system_of(CONFIG)
    given = system, system.stage("joint"), {"params": params}, 0.4
    interop.save_run(*given, workdir)
    predictor = inference.load(workdir)
    assert (predictor.stage.name, predictor.threshold) == ("joint", 0.4)
    assert predictor.config == CONFIG
    assert same_bits(predictor.variables, {"params": params})
    with pytest.raises(InputError, match="exists already"):
        interop.save_run(*given, workdir)
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
