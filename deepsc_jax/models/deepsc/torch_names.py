"""DeepSC-COVID's names in PyTorch."""

from deepsc_jax.models.torch_names import CONV, DECONV, LINEAR, POINT, Rule

TORCH_NAMES = (
    Rule("inception_{task}/b{i}_{j}/kernel", "inception_{task}.branches.{i}.{j}.weight", CONV),
    Rule("inception_{task}/norm/scale", "inception_{task}.norm.weight"),
    Rule("inception_{task}/norm/bias", "inception_{task}.norm.bias"),
    Rule("inception_{task}/plain/conv/kernel", "inception_{task}.plain.conv.weight", CONV),
    Rule("inception_{task}/plain/norm/scale", "inception_{task}.plain.norm.weight"),
    Rule("inception_{task}/plain/norm/bias", "inception_{task}.plain.norm.bias"),
    Rule("cross_stitch/weights", "cross_stitch.weights"),
    Rule("lesion/{unit}/conv{i}/conv/kernel", "lesion.{unit}.{i}.conv.weight", CONV),
    Rule("lesion/{unit}/conv{i}/norm/scale", "lesion.{unit}.{i}.norm.weight"),
    Rule("lesion/{unit}/conv{i}/norm/bias", "lesion.{unit}.{i}.norm.bias"),
    Rule("lesion/deconv{n}/kernel", "lesion.deconv{n}.weight", DECONV),
    Rule("lesion/segmentation{n}/kernel", "lesion.segmentation{n}.weight", POINT),
    Rule("lesion/segmentation{n}/bias", "lesion.segmentation{n}.bias"),
    Rule("classifier/stem/conv/kernel", "classifier.stem.conv.weight", CONV),
    Rule("classifier/stem/norm/scale", "classifier.stem.norm.weight"),
    Rule("classifier/stem/norm/bias", "classifier.stem.norm.bias"),
    Rule("classifier/lesion_stem/kernel", "classifier.lesion_stem.weight", CONV),
    Rule(
        "classifier/encoder{n}/conv0/conv/kernel", "classifier.encoder{n}.first.conv.weight", CONV
    ),
    Rule("classifier/encoder{n}/conv0/norm/scale", "classifier.encoder{n}.first.norm.weight"),
    Rule("classifier/encoder{n}/conv0/norm/bias", "classifier.encoder{n}.first.norm.bias"),
    Rule("classifier/encoder{n}/conv1/kernel", "classifier.encoder{n}.conv.weight", CONV),
    Rule("classifier/encoder{n}/norm1/scale", "classifier.encoder{n}.norm.weight"),
    Rule("classifier/encoder{n}/norm1/bias", "classifier.encoder{n}.norm.bias"),
    Rule("classifier/encoder{n}/shortcut/kernel", "classifier.encoder{n}.shortcut.0.weight", CONV),
    Rule("classifier/encoder{n}/shortcut_norm/scale", "classifier.encoder{n}.shortcut.1.weight"),
    Rule("classifier/encoder{n}/shortcut_norm/bias", "classifier.encoder{n}.shortcut.1.bias"),
    Rule("classifier/kernel", "classifier.linear.weight", LINEAR),
)
