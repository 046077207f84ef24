"""MONAI's DynUNet as it is timed beside MLPerf's 3D U-Net, whose function it computes."""

from collections.abc import Mapping
from typing import Any

from monai.networks.nets.dynunet import DynUNet
from torch import Tensor

from deepsc_jax.benchmarking.jobs import InapplicableError
from deepsc_jax.config import Config
from deepsc_jax.models.comparators.unet3d import CLASSES, Options
from peers.unet3d import Forward, Objective, Predictor, inputs

LEAST_LEVELS = 3

__all__ = ["Forward", "Objective", "Predictor", "inputs", "name_of", "network"]


class Network(DynUNet):
    """Takes weights by MLPerf's names."""

    def __init__(self, widths: tuple[int, ...]):
        levels = len(widths)
        super().__init__(
            3,
            1,
            CLASSES,
            [3] * levels,
            [1] + [2] * (levels - 1),
            [2] * (levels - 1),
            filters=widths,
            act_name="relu",
            norm_name=("instance", {"affine": True}),
            trans_bias=True,
        )

    def load_state_dict(self, state_dict: Mapping[str, Tensor], **more: Any) -> Any:  # type: ignore[override]
        own = {name_of(name): value for name, value in state_dict.items()}
        found = super().load_state_dict(own, strict=False, **more)
        # Its `skip_layers` are the same modules again.
        missing = [name for name in found.missing_keys if not name.startswith("skip_layers.")]
        assert not missing, missing
        assert not found.unexpected_keys, found.unexpected_keys
        return found


def network(config: Config) -> Network:
    """Of the widths of a configuration.

    Raises:
      InapplicableError: fewer levels than DynUNet has.
    """
    assert isinstance(config.model, Options)
    widths = config.model.widths
    if len(widths) < LEAST_LEVELS:
        raise InapplicableError(
            f"--peer=dynunet: --unet3d.widths has {len(widths)} levels: give {LEAST_LEVELS}"
        )
    return Network(widths)


def name_of(name: str) -> str:
    """DynUNet's name for one of MLPerf's."""
    block, rest = name.rsplit(".conv", 1) if ".conv" in name else (name, "")
    block = block.replace("downsample.", "downsamples.")
    if "upsample_conv" in name:
        return block.replace("upsample.", "upsamples.").replace(
            "upsample_conv.0", "transp_conv.conv"
        )
    if name.startswith("output"):
        return f"output_block.conv.conv.{name.rsplit('.', 1)[1]}"
    number, layer, kind = rest.split(".")
    part = f"conv{number}.conv" if layer == "0" else f"norm{number}"
    inside = ".conv_block" if name.startswith("upsample.") else ""
    return f"{block.replace('upsample.', 'upsamples.')}{inside}.{part}.{kind}"
