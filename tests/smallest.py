"""The smallest joint network, for tests whose time is compilation: as a model, and as flags."""

from deepsc_jax.models.deepsc.config import Options

MODEL = Options(
    inception_branches=((1,), (3,)),
    inception_channels=4,
    lesion_channels=(4, 4, 4),
    classifier_stem_channels=4,
    encoder_channels=(4, 4, 4),
    norm_groups=2,
)
# Of the plain variant, and with a working grid of one tile's width.
FLAGS = (
    "--working_size=16,16",
    "--tile=8,16,16",
    "--slices=8",
    "--deepsc.inception=plain",
    "--deepsc.inception_branches=1,3",
    "--deepsc.inception_channels=4",
    "--deepsc.lesion_channels=4,4,4",
    "--deepsc.classifier_stem_channels=4",
    "--deepsc.encoder_channels=4,4,4",
    "--deepsc.norm_groups=2",
)
