"""Loading as MONAI's users do: a `PersistentDataset` in a torch DataLoader, on the same scans.

What is deterministic (the prepared scan, padded as ours, float32) is kept as MONAI keeps it, so
that nothing is unpacked or resampled; the mirror and the intensities are changed anew each time. A
stage that reads drawn tiles has them cut by `RandCropByPosNegLabeld`.
"""

import os
from collections.abc import Hashable, Mapping

import numpy as np
import torch
from torch.utils.data import DataLoader

from deepsc_jax.benchmarking import works
from deepsc_jax.benchmarking.jobs import Job
from deepsc_jax.benchmarking.works import Built
from deepsc_jax.data.store import Store, StoredCase
from deepsc_jax.runtime.types import Untyped


def build(job: Job) -> Built:
    """Batches of the training split, as many as ours takes in a call."""
    from monai.data.dataset import PersistentDataset
    from monai.data.utils import list_data_collate

    config = job.config
    assert job.data_dir is not None
    store = Store(job.data_dir / "store", config.data)
    cases = store.cases("train")
    dataset = PersistentDataset(
        [{"case": case.name} for case in cases], _transform(job, store), job.folder / "monai"
    )
    loader = DataLoader(
        dataset,
        job.scans,
        sampler=torch.utils.data.RandomSampler(
            dataset, replacement=True, num_samples=works.BATCHES * job.scans
        ),
        num_workers=os.cpu_count() or 1,
        collate_fn=list_data_collate,
    )
    for index in range(len(cases)):
        dataset[index]  # is kept now

    def run() -> int:
        return sum(len(batch["volume"]) for batch in loader)

    depths = (max(case.depth for case in cases),) * works.BATCHES
    return Built(run, lambda _: {}, depths=depths)


def _transform(job: Job, store: Store) -> Untyped:
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.dictionary import RandCropByPosNegLabeld
    from monai.transforms.intensity.dictionary import RandScaleIntensityd, RandShiftIntensityd
    from monai.transforms.spatial.dictionary import RandFlipd
    from monai.transforms.transform import Transform

    config, keys = job.config, ["volume", "lesion"]
    by_name = {case.name: case for case in store.cases("train")}
    depth = config.data.bucket(max(case.depth for case in by_name.values()))

    class Prepared(Transform):
        """The arrays of a case, (1, D, H, W) float32."""

        def __call__(self, item: Mapping[Hashable, str]) -> dict[str, torch.Tensor]:
            return _arrays(store, by_name[item["case"]], depth)

    train = config.train
    steps: list[Untyped] = [Prepared()]
    if job.reads.tiles == "drawn":
        count = train.tiles_per_scan
        steps += [
            RandCropByPosNegLabeld(
                keys, "lesion", config.data.tile, num_samples=count, allow_smaller=True
            )
        ]
    steps += [
        RandFlipd(keys, train.flip_probability, spatial_axis=2),
        RandScaleIntensityd("volume", train.intensity_scale, 1.0),
        RandShiftIntensityd("volume", train.intensity_shift, prob=1.0),
    ]
    return Compose(steps)


def _arrays(store: Store, case: StoredCase, depth: int) -> dict[str, torch.Tensor]:
    stop = (depth, *case.shape[1:])
    lesion = store.read(case.name, "lesion", (0, 0, 0), stop)
    return {
        "volume": torch.from_numpy(store.read(case.name, "volume", (0, 0, 0), stop)[None]),
        "lesion": torch.from_numpy(lesion[None].astype(np.float32)),
    }
