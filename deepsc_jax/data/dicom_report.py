"""A DICOM structured report of a prediction: TID 1500, Measurement Report, by highdicom.

Source: DICOM PS3.16, TID 1500, 1411 (volumetric ROI) and 1501 (measurements without an ROI).
"""

from collections.abc import Mapping, Sequence

from deepsc_jax import __version__
from deepsc_jax.data.dicom_objects import KINDS, NAME, device_uid, instance
from deepsc_jax.runtime.types import Untyped

_SCHEME = "99DEEPSC"  # private, as DICOM PS3.16, 8 has it: begins with 99
_LONGEST = 64  # letters of a code's meaning


def report(
    images: Sequence[Untyped],
    segmentation: Untyped,
    volumes_ml: Mapping[str, float],
    probabilities: Mapping[str, float],
    digest: str,
) -> Untyped:
    """The volume of each segment, the lesions' share of the lungs, the probability of each class.

    Args:
      images: the series, as of `dicom_source.source_images`.
      segmentation: the DICOM SEG, whose segments are in the order of `volumes_ml`.
      volumes_ml: of its segments, by name.
      probabilities: of the classes, by name; empty where the network has none.
      digest: of the network.
    """
    import highdicom as hd
    from highdicom.coding_schemes import CodingSchemeIdentificationItem
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    by_program = hd.sr.AlgorithmIdentification(
        name=NAME, version=__version__, parameters=[f"network {digest[:16]}"]
    )
    groups: list[Untyped] = [
        hd.sr.VolumetricROIMeasurementsAndQualitativeEvaluations(
            tracking_identifier=hd.sr.TrackingIdentifier(
                uid=segmentation.SegmentSequence[number - 1].TrackingUID, identifier=name
            ),
            referenced_segment=_segment(images, segmentation, number),
            finding_type=Code(KINDS[name].code[0], "SCT", KINDS[name].code[1]),
            finding_sites=[hd.sr.FindingSite(anatomic_location=codes.SCT.Lung)],
            algorithm_id=by_program,
            measurements=_volume(name, volumes_ml),
        )
        for number, name in enumerate(volumes_ml, 1)
    ]
    if probabilities:
        groups.append(_diagnosis(images, probabilities, by_program))
    device = hd.sr.DeviceObserverIdentifyingAttributes(
        uid=device_uid(digest), name=NAME, manufacturer_name=NAME, model_name=NAME
    )
    content = hd.sr.MeasurementReport(
        observation_context=hd.sr.ObservationContext(
            observer_device_context=hd.sr.ObserverContext(
                observer_type=codes.DCM.Device, observer_identifying_attributes=device
            )
        ),
        procedure_reported=Code("24627-2", "LN", "CT Chest"),
        imaging_measurements=groups,
        title=codes.DCM.ImagingMeasurementReport,
    )
    return hd.sr.Comprehensive3DSR(
        evidence=[segmentation, *images],
        content=content[0],
        is_complete=True,
        is_final=False,  # and nobody has verified it
        coding_schemes=[
            CodingSchemeIdentificationItem(
                designator=_SCHEME,
                name="Classes of deepsc_jax",
                version=__version__,
                responsible_organization=NAME,
            )
        ],
        series_description=f"{NAME}: measurements, research use only",
        **instance(1002),
    )


def _segment(images: Sequence[Untyped], segmentation: Untyped, number: int) -> Untyped:
    """A reference to a segment and the series that it is of; it may be without a frame."""
    import highdicom as hd

    return hd.sr.ReferencedSegment(
        sop_class_uid=segmentation.SOPClassUID,
        sop_instance_uid=segmentation.SOPInstanceUID,
        segment_number=number,
        source_series=hd.sr.SourceSeriesForSegmentation(images[0].SeriesInstanceUID),
    )


def _volume(name: str, volumes_ml: Mapping[str, float]) -> list[Untyped]:
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    unit = Code("mL", "UCUM", "milliliter")
    found = [hd.sr.Measurement(name=codes.SCT.Volume, value=volumes_ml[name], unit=unit)]
    if name == "lesion" and volumes_ml.get("lungs"):
        found.append(
            hd.sr.Measurement(
                name=Code("lesion-share", _SCHEME, "Share of the lungs' volume"),
                value=100 * volumes_ml[name] / volumes_ml["lungs"],
                unit=codes.UCUM.Percent,
            )
        )
    return found


def _diagnosis(
    images: Sequence[Untyped], probabilities: Mapping[str, float], by_program: Untyped
) -> Untyped:
    """The class of the whole scan."""
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code

    coded = {
        name: Code(f"class-{number}", _SCHEME, name[:_LONGEST])
        for number, name in enumerate(probabilities)
    }
    most = max(probabilities, key=lambda name: probabilities[name])
    return hd.sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=hd.sr.TrackingIdentifier(uid=hd.UID(), identifier="class"),
        algorithm_id=by_program,
        finding_sites=[hd.sr.FindingSite(anatomic_location=codes.SCT.Lung)],
        source_images=[
            hd.sr.SourceImageForMeasurementGroup(image.SOPClassUID, image.SOPInstanceUID)
            for image in images
        ],
        measurements=[
            hd.sr.Measurement(
                name=Code(f"probability-{number}", _SCHEME, f"Probability of {name}"[:_LONGEST]),
                value=probabilities[name],
                unit=codes.UCUM.NoUnits,
            )
            for number, name in enumerate(probabilities)
        ],
        qualitative_evaluations=[
            hd.sr.QualitativeEvaluation(
                name=Code("class", _SCHEME, "Most probable class"), value=coded[most]
            )
        ],
    )
