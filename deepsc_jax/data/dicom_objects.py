"""A DICOM segmentation and parametric maps on a CT series' own frames, by highdicom.

Needs highdicom (the extra `dicom`). Every frame refers to the slice it lies on and has its
position: a tilted gantry, a reversed order and gaps in the numbers of instances change nothing.

Source: DICOM PS3.3, A.51 (Segmentation IOD) and A.75 (Parametric Map IOD).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
from jaxtyping import Bool, Float

from deepsc_jax import __version__
from deepsc_jax.runtime.types import Untyped

Frames = Bool[np.ndarray, "slice row column"]

NAME = "deepsc_jax"
DESCRIPTION = "research use only"
_MOST = np.iinfo(np.uint16).max  # of a stored value of a parametric map


@dataclass(frozen=True)
class Kind:
    """How a segment is coded: SNOMED CT's codes, and CIELab by `colour` in RGB."""

    label: str
    code: tuple[str, str]
    abnormal: bool
    colour: tuple[int, int, int]


KINDS = {
    "lesion": Kind("Lesion", ("52988006", "Lesion"), True, (230, 97, 1)),
    "lungs": Kind("Lungs", ("39607008", "Lung"), False, (94, 160, 200)),
    "left_lung": Kind("Left lung", ("44029006", "Left lung"), False, (94, 160, 200)),
    "right_lung": Kind("Right lung", ("3341006", "Right lung"), False, (120, 190, 220)),
}
"""What may be a segment, by its name in a prediction; `lungs` are both in one."""


class _Instance(TypedDict):
    """What highdicom asks of each instance."""

    series_instance_uid: str
    series_number: int
    sop_instance_uid: str
    instance_number: int
    manufacturer: str


class Equipment(TypedDict):
    """What highdicom asks of the program that made an image."""

    manufacturer_model_name: str
    software_versions: str
    device_serial_number: str


def instance(series_number: int) -> _Instance:
    """A new instance, alone in a new series."""
    import highdicom as hd

    return {
        "series_instance_uid": hd.UID(),
        "series_number": series_number,
        "sop_instance_uid": hd.UID(),
        "instance_number": 1,
        "manufacturer": NAME,
    }


def equipment(digest: str) -> Equipment:
    """This program with a network, which `digest` tells from others."""
    return {
        "manufacturer_model_name": NAME,
        "software_versions": __version__,
        "device_serial_number": digest[:16],
    }


def device_uid(digest: str) -> str:
    """A UID of this program with a network (DICOM PS3.5, B.2: derived from 128 bits)."""
    number = int(hashlib.sha256(f"{NAME} {digest}".encode()).hexdigest()[:32], 16)
    return f"2.25.{number}"


def algorithm(digest: str) -> Untyped:
    """The algorithm that made the segments."""
    import highdicom as hd
    from pydicom.sr.codedict import codes

    return hd.AlgorithmIdentificationSequence(
        name=NAME,
        family=codes.cid7162.ArtificialIntelligence,
        version=__version__,
        source=NAME,
        parameters={"network": digest[:16]},
    )


def segmentation(images: Sequence[Untyped], masks: Mapping[str, Frames], digest: str) -> Untyped:
    """A binary DICOM SEG, a segment for each mask; segments may overlap, as lesions and lungs do.

    Slices of a segment without a voxel have no frame. Where no segment has one, all have all.

    Args:
      images: the series, as of `dicom_source.source_images`.
      masks: by their names in `KINDS`, on its slices.
      digest: of the network.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    categories = codes.cid7150.AnatomicalStructure, codes.cid7150.MorphologicallyAbnormalStructure
    descriptions = []
    for number, name in enumerate(masks, 1):
        kind = KINDS[name]
        value, meaning = kind.code
        descriptions.append(
            hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=kind.label,
                segmented_property_category=categories[kind.abnormal],
                segmented_property_type=Code(value, "SCT", meaning),
                algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm(digest),
                tracking_uid=hd.UID(),
                tracking_id=name,
                anatomic_regions=[codes.SCT.Lung] if kind.abnormal else None,
                display_color=hd.color.CIELabColor.from_rgb(*kind.colour),
            )
        )
    pixels = np.stack(list(masks.values()), axis=-1).astype(np.uint8)
    return hd.seg.Segmentation(
        source_images=images,
        pixel_array=pixels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        omit_empty_frames=bool(pixels.any()),
        content_label="SEGMENTATION",
        content_description=DESCRIPTION,
        series_description=f"{NAME}: lesions and lungs",
        **instance(1001),
        **equipment(digest),
    )


def parametric_map(
    images: Sequence[Untyped],
    evidence: Float[np.ndarray, "slice row column"],
    name: str,
    number: int,
    digest: str,
) -> Untyped:
    """A map in [0, 1] as a DICOM parametric map of 16 bits, losslessly compressed (JPEG-LS).

    Its real-world values are off by at most 1/131070.

    Args:
      images: the series, as of `dicom_source.source_images`.
      evidence: on its slices.
      name: of the map.
      number: of its series.
      digest: of the network.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import JPEGLSLossless

    stored = np.round(np.clip(evidence, 0, 1) * _MOST).astype(np.uint16)
    mapping = hd.pm.RealWorldValueMapping(
        lut_label="evidence",
        lut_explanation="relative evidence for the most probable class",
        unit=codes.UCUM.NoUnits,
        value_range=(0, int(_MOST)),
        slope=1 / _MOST,
        intercept=0.0,
    )
    return hd.pm.ParametricMap(
        source_images=images,
        pixel_array=stored,
        contains_recognizable_visual_features=False,
        real_world_value_mappings=[mapping],
        voi_lut_transformations=[
            hd.VOILUTTransformation(window_center=_MOST / 2, window_width=float(_MOST))
        ],
        transfer_syntax_uid=JPEGLSLossless,
        content_label="EVIDENCE",
        content_description=DESCRIPTION,
        series_description=f"{NAME}: {name}",
        **instance(number),
        **equipment(digest),
    )
