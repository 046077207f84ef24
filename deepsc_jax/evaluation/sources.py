"""A stored case as it came: its values and masks on its source's grid. Needs no JAX."""

import numpy as np

from deepsc_jax.data import preprocess, scans, xrays
from deepsc_jax.data.store import Store, StoredCase
from deepsc_jax.evaluation.baselines import BaselineCase


def source_case(
    store: Store, case: StoredCase, intensity: str, nuisances: dict[str, float] | None = None
) -> BaselineCase:
    """A stored case's values, lesions and lungs on its source's grid.

    Raises:
      InputError: a source is missing or has changed since the case was prepared.
    """
    if store.data.modality == "xray":
        return _source_xray(case, nuisances or {})
    with case.unchanged_sources():
        scan = scans.load_scan(case.scan, "hu" if intensity == "hu" else "unit", store.data.allow)
        lesion = np.zeros(scan.values.shape, bool)
        if case.lesion_mask is not None:
            lesion = scans.load_mask(case.lesion_mask, scan, allow=store.data.allow)
        if case.lung_mask is not None:
            lung = scans.load_mask(case.lung_mask, scan, "lung mask", store.data.allow)
    if case.lung_mask is None:
        lung = preprocess.to_source(store.read(case.name, "lung"), case.grid) >= 0.5
    return BaselineCase(scan.values, lesion, lung, scan.spacing_mm, case.label, nuisances or {})


def _source_xray(case: StoredCase, nuisances: dict[str, float]) -> BaselineCase:
    """The same of an X-ray, in pixels; all of it counts where its lungs are not known."""
    with case.unchanged_sources():
        values = xrays.load_xray(case.scan)
        lesion, lung = np.zeros(values.shape, bool), np.ones(values.shape, bool)
        if case.lesion_mask is not None:
            lesion = xrays.load_mask(case.lesion_mask, values)
        if case.lung_mask is not None:
            lung = xrays.load_mask(case.lung_mask, values, "lung mask")
    return BaselineCase(values, lesion, lung, (1.0, 1.0, 1.0), case.label, nuisances)
