"""What a scan becomes before it reaches a network."""

import dataclasses
import re
from typing import Literal

from deepsc_jax.config.options import Ints3, option, require

CLASSES = ("covid-19", "cap", "non-pneumonia")
Modality = Literal["ct", "xray"]
VoxelClass = Literal["background", "left_lung", "right_lung", "lesion"]  # as they are stored
_COLUMN = re.compile(r"[a-z0-9_]+")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a scan becomes before it reaches the network."""

    modality: Modality = option(
        "ct",
        "paper: ct (DeepSC-COVID, QC-HC U-Net), scans; xray (CNNCF), pictures, of which each is a "
        "scan of one slice: from its darkest to its brightest grey, all of it stretched to "
        "working_size",
    )
    intensity: Literal["hu", "unit"] = option(
        "hu", "assumed: hu for CT numbers; unit for 8-bit or [0, 1] images, which are only scaled"
    )
    allow: tuple[Literal["voxels", "lungs", "intensity"], ...] = option(
        (),
        "assumed: none. Of voxels,lungs,intensity: kinds of doubt about a scan (voxel sizes and "
        "positions, volume of the lungs, values that are no HU) to note and not to refuse",
    )
    mask: Literal["lungs", "none"] = option(
        "lungs",
        "paper: lungs, outside of which a network sees nothing (DeepSC-COVID); none, for networks "
        "that find the lungs, which see z-scores of the whole scan (QC-HC U-Net)",
    )
    hu_window: tuple[float, float] = option(
        (-1400.0, 200.0), "paper: CT numbers are clipped to this range and scaled to [0, 1] (V-A)"
    )
    lung_level_hu: float = option(
        0.0,
        "paper: 0, HU as they are. assumed: HU that a quarter of the lungs' voxels lie below, to "
        "which each scan is shifted: how dense a lung is depends on how deep the breath was",
    )
    working_spacing_mm: tuple[float, float, float] = option(
        (0.0, 0.0, 0.0),
        "paper: 0, slices as they come. assumed: > 0 resamples that axis (depth, height, width)",
    )
    working_slices: int = option(
        0,
        "paper: 0, slices as they come (DeepSC-COVID); 300 (CNNCF), into which the depth of a scan "
        "that is not masked is divided, whatever working_spacing_mm says of depth",
    )
    working_size: tuple[int, int] = option(
        (512, 512), "paper: 512,512: height and width of the grid the network sees"
    )
    patches: Literal["none", "window", "resize"] = option(
        "none",
        "paper: none, whole frames. Patches of lesions (CNNRF), of which each is a slice of "
        "working_size: assumed: window, about the middle of a lesion, without resizing; code: "
        "resize, the lesion's own box. Of boxes of the case list, else of the lesion mask",
    )
    frame_size: tuple[int, int] = option(
        (512, 512), "paper: 512,512: the grid that patches are cut from; without patches unused"
    )
    indicators: tuple[str, ...] = option(
        (),
        "paper: none; of CNNRF five: white cells, neutrophils, lymphocytes, procalcitonin, "
        "C-reactive protein. Columns of the case list that hold what is to be predicted",
    )
    intensity_mean: float = option(
        0.36, "assumed: of [0, 1] values inside lungs, subtracted there; 0 for the paper's input"
    )
    intensity_sd: float = option(
        0.1, "assumed: of [0, 1] values inside lungs, divided by there; 1 for the paper's input"
    )
    classes: tuple[str, ...] = option(
        CLASSES, "paper: covid-19,cap,non-pneumonia, the classes of the scans, by id"
    )
    lesion_free: str = option(
        "non-pneumonia",
        "paper: the class whose scans have no lesion. assumed: empty where all have some",
    )
    tile: Ints3 = option(
        (64, 128, 128), "assumed: depth, height, width of the non-overlapping tiles"
    )
    slices: int = option(64, "assumed: T, the slices sampled for classification")
    depth_bucket: int = option(64, "assumed: depths are padded to a multiple of this many slices")
    depth_buckets: int = option(
        3,
        "assumed: depths, at most, to which scans of a split are padded, one in a batch, each "
        "compiled apart; 1 pads all to the deepest one's",
    )

    def __post_init__(self) -> None:
        self._check_classes()
        self._check_modality()
        self._check_patches()
        require(self.intensity_sd > 0, f"intensity_sd is {self.intensity_sd:g}: give one above 0")
        low, high = self.hu_window
        require(low < high, f"hu_window is {low:g},{high:g}: give the lower bound first")
        require(
            self.lung_level_hu == 0 or (self.mask == "lungs" and self.intensity == "hu"),
            f"lung_level_hu is {self.lung_level_hu:g}, mask is {self.mask} and intensity is "
            f"{self.intensity}: give 0, or --mask=lungs and --intensity=hu",
        )
        require(
            self.lung_level_hu == 0 or low < self.lung_level_hu < high,
            f"lung_level_hu is {self.lung_level_hu:g}, outside of hu_window: give one between "
            f"{low:g} and {high:g}",
        )
        require(
            all(s >= 0 for s in self.working_spacing_mm),
            f"working_spacing_mm is {self.working_spacing_mm}: give 0 (as it comes) or millimetres",
        )
        require(
            self.working_slices == 0 or (self.mask == "none" and 1 <= self.working_slices <= 4096),
            f"working_slices is {self.working_slices} and mask is {self.mask}: give 0, or with "
            "--mask=none from 1 to 4096",
        )
        depth, height, width = self.tile
        require(all(t > 0 for t in self.tile), f"tile is {self.tile}: give sides above 0")
        rows, columns = self.working_size
        require(
            rows > 0 and columns > 0, f"working_size is {self.working_size}: give positive sizes"
        )
        require(
            rows % height == 0 and columns % width == 0,
            f"no tile of {height}x{width} fits the working grid of {rows}x{columns} a whole number "
            "of times: choose a tile that divides working_size",
        )
        require(self.slices >= 1, f"slices is {self.slices}: at least 1 slice is needed")
        require(
            self.depth_bucket > 0 and self.depth_bucket % depth == 0,
            f"depth_bucket is {self.depth_bucket}: give a multiple of the tile depth {depth}",
        )

        require(
            self.depth_buckets >= 1,
            f"depth_buckets is {self.depth_buckets}: give at least 1 (all to the deepest one's)",
        )

    def _check_modality(self) -> None:
        """Refuse for X-rays what is for volumes: they have no lungs to be masked by, and no mm."""
        needed = {"mask": "none", "slices": 1, "working_spacing_mm": (0, 0, 0)}
        if self.patches != "none":
            needed.pop("slices")
        for name, value in needed.items() if self.modality == "xray" else ():
            given = getattr(self, name)
            text = ",".join(f"{x:g}" for x in given) if isinstance(given, tuple) else given
            wanted = "0,0,0" if isinstance(value, tuple) else value
            require(given == value, f"{name} is {text} and modality is xray: give {wanted}")

    def _check_patches(self) -> None:
        """Refuse patches that cannot be cut, and indicators that are no columns of their own."""
        names = self.indicators
        require(
            len(set(names)) == len(names) and all(map(_COLUMN.fullmatch, names)),
            f"indicators is {','.join(names)}: give names of small letters, digits, _, each once",
        )
        if self.patches == "none":
            return
        require(
            self.mask == "none",
            f"patches is {self.patches} and mask is {self.mask}: a patch has what is around a "
            "lesion too: give --mask=none",
        )
        (rows, columns), (height, width) = self.working_size, self.frame_size
        require(
            rows == columns <= min(height, width),
            f"working_size is {rows},{columns} and patches is {self.patches}: give a square that "
            f"fits into frame_size, {height},{width}",
        )

    @property
    def grid_size(self) -> tuple[int, int]:
        """Height and width of the grid that a scan is brought to, from which patches are cut."""
        return self.working_size if self.patches == "none" else self.frame_size

    def _check_classes(self) -> None:
        require(
            len(set(self.classes)) == len(self.classes) > 1,
            f"classes is {','.join(self.classes)}: give two or more names, each once",
        )
        require(
            self.lesion_free in ("", *self.classes),
            f"lesion_free is {self.lesion_free}: give one of {','.join(self.classes)}, or nothing "
            "(--lesion_free=) where all have lesions",
        )

    @property
    def lesion_free_id(self) -> int:
        """The id of the class whose scans have no lesion; -1, which no scan has, without one."""
        return self.classes.index(self.lesion_free) if self.lesion_free else -1

    def bucket(self, depth: int) -> int:
        """The padded depth, in slices, of a scan of `depth` slices."""
        return -(-depth // self.depth_bucket) * self.depth_bucket

    def tile_counts(self, depth: int) -> Ints3:
        """Tiles along depth, height and width of a scan of `depth` slices."""
        return (
            -(-depth // self.tile[0]),
            self.working_size[0] // self.tile[1],
            self.working_size[1] // self.tile[2],
        )
