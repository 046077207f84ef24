"""QC-HC U-Net's names in PyTorch."""

from deepsc_jax.models.layers.batch_norm import norm_names
from deepsc_jax.models.torch_names import CONV, DECONV, POINT, Rule


def _unit_names(ours: str, theirs: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{ours}/conv/kernel", f"{theirs}.conv.weight", CONV),
        Rule(f"{ours}/conv_bias", f"{theirs}.conv.bias"),
        *norm_names(f"{ours}/norm", f"{theirs}.norm"),
    )


TORCH_NAMES = (
    *_unit_names("stem", "stem"),
    *_unit_names("encoder{i}/{unit}", "encoder.{i}.{unit}"),
    *_unit_names("decoder{i}/{unit}", "decoder.{i}.{unit}"),
    Rule("decoder{i}/up/kernel", "decoder.{i}.up.weight", DECONV),
    Rule("decoder{i}/up/bias", "decoder.{i}.up.bias"),
    *norm_names("decoder{i}/up_norm", "decoder.{i}.up_norm"),
    Rule("scores{i}/kernel", "scores.{i}.weight", POINT),
    Rule("scores{i}/bias", "scores.{i}.bias"),
)
