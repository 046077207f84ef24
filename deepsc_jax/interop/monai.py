"""MONAI's 3D U-Net trained as the segmentation stage is: a peer to compare held-out DSC with.

    FLAGS="--flagfile=configs/covid_ct_seg.flags"
    python -m deepsc_jax.interop.monai $FLAGS --data_dir=DIR --out=DIR

The same batches in the same order (tiles, augmentation, intensities), as many steps, Adam with the
same linear decay, the same tiles at inference, the same evaluation. Its own are the network, the
loss of MONAI's tutorials (Dice + cross-entropy) and torch's initial weights. It has two outputs, as
there: with one, MONAI's U-Net normalises that one channel just before its last layer and hardly
learns small lesions. Needs the extra `monai`.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import torch
from absl import flags
from monai.losses.dice import DiceCELoss
from monai.networks.nets.unet import UNet

from deepsc_jax.config import Config
from deepsc_jax.data import pipeline
from deepsc_jax.data.prediction import Prediction
from deepsc_jax.data.store import Store
from deepsc_jax.evaluation.scoring import evaluate
from deepsc_jax.evaluation.thresholds import choose_threshold
from deepsc_jax.geometry.sampling import cut_tiles, tile_corners
from deepsc_jax.metrics.tables import table
from deepsc_jax.models import registry
from deepsc_jax.runtime import entry
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.files import local_path, write_own_json
from deepsc_jax.runtime.places import output_folder
from deepsc_jax.runtime.progress import Progress
from deepsc_jax.systems.building import build
from deepsc_jax.systems.decoding import decode
from deepsc_jax.systems.system import Stage, System


@dataclasses.dataclass
class Peer:
    """A trained U-Net; stands where an `inference.Predictor` does."""

    config: Config
    network: torch.nn.Module
    threshold: float = 0.5

    def __call__(self, volume: np.ndarray) -> Prediction:
        """Lesion probability of a preprocessed scan (D, H, W), tile by tile."""
        data = self.config.data
        padded = np.pad(volume, [(0, data.bucket(len(volume)) - len(volume)), (0, 0), (0, 0)])
        lesion = np.zeros_like(padded)
        tiles = cut_tiles(padded, data.tile)
        origins = tile_corners(padded.shape, data.tile)
        with torch.no_grad():
            for tile, (z, y, x) in zip(tiles, origins, strict=True):
                logits = self.network(_inputs(tile[None], self.config))
                probability = torch.softmax(logits, dim=1)[0, 1]
                d, h, w = tile.shape
                lesion[z : z + d, y : y + h, x : x + w] = probability.numpy()
        return Prediction({"lesion": lesion[: len(volume)]})


def _inputs(tiles: np.ndarray, settings: Config) -> torch.Tensor:
    """Tiles (N, d, h, w) as (N, 1, d, h, w), standardised inside the lungs as DeepSC does."""
    data = settings.data
    standard = (tiles - data.intensity_mean) / data.intensity_sd
    return torch.from_numpy(np.where(tiles > 0, standard, 0).astype(np.float32)[:, None])


def make_unet(channels: Sequence[int]) -> torch.nn.Module:
    """MONAI's U-Net of these channels a level, as its tutorials have it."""
    strides = [2] * (len(channels) - 1)
    norm = ("INSTANCE", {"affine": True})
    return UNet(3, 1, 2, channels, strides, num_res_units=2, norm=norm)


def segmentation_stage(system: System) -> Stage:
    """The stage whose batches and steps the peer takes: the first that draws tiles.

    Raises:
      InputError: there is none.
    """
    for stage in system.stages:
        if stage.reads.tiles == "drawn":
            return stage
    raise InputError(
        f"--model={system.config.name}: it has no stage that draws tiles, which the U-Net is "
        "trained on: name a model that segments"
    )


def train(settings: Config, store: Store, channels: tuple[int, ...]) -> Peer:
    """Train a U-Net of `channels` per level for the segmentation stage's steps."""
    system = build(settings)
    stage, options = segmentation_stage(system), settings.train
    torch.manual_seed(options.seed)
    network = make_unet(channels)
    loss_fn = DiceCELoss(softmax=True, to_onehot_y=True, include_background=False)
    optimizer = torch.optim.Adam(network.parameters(), settings.stage(stage.name).learning_rate)
    steps = stage.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    batches = iter(
        pipeline.batches(
            store,
            "train",
            stage.reads,
            settings,
            seed=system.seed(stage),
            batch_size=stage.batch,
        )
    )
    progress = Progress("MONAI UNet", steps, lines=True)
    for step in range(1, steps + 1):
        batch = decode(next(batches), stage.reads, settings.data, options)
        tiles, lesions = (
            np.array(batch[name]).reshape(-1, *settings.data.tile) for name in ("tiles", "lesions")
        )
        loss = loss_fn(network(_inputs(tiles, settings)), torch.from_numpy(lesions[:, None]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % options.log_every == 0:
            progress.show(step, loss=loss.item())
    batches.close()
    return Peer(settings, network.eval())


def _channels(texts: Sequence[str]) -> tuple[int, ...]:
    if len(texts) < 2 or not all(re.fullmatch("[1-9][0-9]{0,5}", text) for text in texts):
        raise InputError(
            f"--channels={','.join(texts)}: expected whole numbers above 0, of 2 levels at least: "
            "such as --channels=16,32,64"
        )
    return tuple(map(int, texts))


CONFIG = registry.config_flags()


def define_flags() -> None:
    """Define the flags of this command."""
    CONFIG.define()
    flags.DEFINE_string("data_dir", None, "Folder that `prepare` wrote.", required=True)
    flags.DEFINE_string("out", None, "Folder for the results.", required=True)
    flags.DEFINE_list("channels", ["16", "32", "64", "128"], "Channels of the U-Net's levels.")


def main() -> None:
    """Train the peer and evaluate it on the test split."""
    options, settings = flags.FLAGS, CONFIG.config()
    channels = _channels(options.channels)
    segmentation_stage(build(settings))
    folder = local_path("data_dir", options.data_dir) / "store"
    out = output_folder("out", options.out, "scans.json", "metrics.json")
    store = Store(folder, settings.data, settings.train.cache_mib, fold=settings.train.folds)
    peer = train(settings, store, channels)
    peer.threshold = choose_threshold(peer, store) or peer.threshold
    metrics, rows = evaluate(peer, store, "test")
    print(table(metrics))
    write_own_json(rows, out / "scans.json")
    write_own_json(metrics, out / "metrics.json")
    for row in rows:
        if row.get("dsc") is not None:
            print(f"{row['case']:24} DSC {row['dsc']:.3f}")


def run() -> None:
    """Run this command."""
    entry.run(main, define_flags, CONFIG.parse)


if __name__ == "__main__":
    run()
