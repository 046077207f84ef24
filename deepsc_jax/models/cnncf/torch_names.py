"""The names of CNNCF and CNNRF in PyTorch.

Those of CNNCF's published variant, and of its teachers, are MONAI's.
"""

from deepsc_jax.models.cnncf.gate import COLLECTION as GATE
from deepsc_jax.models.layers.batch_norm import norm_names
from deepsc_jax.models.torch_names import CONV2D, LINEAR, POINT2D, Rule

BLOCK_NAMES = (
    Rule("stage{n}_{i}/conv_upper/kernel", "stage{n}.{i}.upper.conv.weight", CONV2D),
    *norm_names("stage{n}_{i}/norm_upper", "stage{n}.{i}.upper.norm"),
    Rule("stage{n}_{i}/conv{k}/kernel", "stage{n}.{i}.lower.conv{k}.weight", CONV2D),
    *norm_names("stage{n}_{i}/norm{k}", "stage{n}.{i}.lower.norm{k}"),
)
STEM_NAMES = (
    Rule("stem/kernel", "stem.conv.weight", CONV2D),
    *norm_names("stem_norm", "stem.norm"),
)
RESIDUAL_NAMES = (
    Rule("conv1/kernel", "conv1.weight", CONV2D),
    *norm_names("bn1", "bn1"),
    Rule("layer{n}_{i}/conv{k}/kernel", "layer{n}.{i}.conv{k}.weight", CONV2D),
    *norm_names("layer{n}_{i}/bn{k}", "layer{n}.{i}.bn{k}"),
    Rule("layer{n}_{i}/downsample/kernel", "layer{n}.{i}.downsample.0.weight", CONV2D),
    *norm_names("layer{n}_{i}/downsample_norm", "layer{n}.{i}.downsample.1"),
    Rule("fc/kernel", "fc.weight", LINEAR),
    Rule("fc/bias", "fc.bias"),
)
TORCH_NAMES = (
    Rule("mix/kernel", "mix.weight", CONV2D),
    Rule("mix/bias", "mix.bias"),
    *STEM_NAMES,
    *BLOCK_NAMES,
    Rule("predictor/kernel", "predictor.weight", LINEAR),
    Rule("predictor/bias", "predictor.bias"),
    Rule("{name}", "gate.{name}", collection=GATE),
    *RESIDUAL_NAMES,
)
REGRESSOR_NAMES = (
    *STEM_NAMES,
    *BLOCK_NAMES,
    Rule("linear{k}/kernel", "regressor.linear{k}.weight", LINEAR),
    Rule("linear{k}/bias", "regressor.linear{k}.bias"),
    Rule("skip/kernel", "regressor.skip.weight", POINT2D),
    *norm_names("skip_norm", "regressor.skip_norm"),
)
