"""What is asked for: a scan, what is given with it, and what its result is called."""

from dataclasses import dataclass
from pathlib import Path

from deepsc_jax.config import DataConfig
from deepsc_jax.inference import privacy
from deepsc_jax.inference.identity import Boxes, Sources, identify
from deepsc_jax.runtime.errors import InputError
from deepsc_jax.runtime.types import JsonObject


@dataclass(frozen=True)
class Request:
    """A scan to predict."""

    name: str
    """Of its result: a path relative to the folder of results."""
    path: Path
    """A file or a folder of DICOM slices."""
    lung_mask: Path | None = None
    """Found where it is None."""
    lesion_mask: Path | None = None
    """For a network of patches, which are cut by it, or by the boxes."""
    boxes: Boxes = ()
    """Around lesions, in pixels of an X-ray."""
    keep_identifiers: bool = False
    """Whether DICOM objects of the result have the patient module of the scan's."""

    @property
    def private(self) -> bool:
        """Whether nothing may be told of the scan but the name: see `privacy`."""
        return self.name.startswith(privacy.PREFIX) or privacy.is_private(self.path)

    @property
    def label(self) -> str:
        """What the scan is called in what is written and printed: its path, or the name."""
        return self.name if self.private else str(self.path)

    def sources(self, earlier: JsonObject | None = None) -> Sources:
        """What is at its paths: see `identity.identify`."""
        return identify(
            self.path,
            self.lung_mask,
            earlier,
            lesion_mask=self.lesion_mask,
            boxes=self.boxes,
            keep_identifiers=self.keep_identifiers,
        )

    def without_names(self, text: str) -> str:
        """A text, of a private scan without its paths and its files' names."""
        if not self.private:
            return text
        masks = {"its lung mask": self.lung_mask, "its lesion mask": self.lesion_mask}
        return privacy.without_names(text, self.name, self.path, masks)

    def require_readable(self, data: DataConfig) -> None:
        """Refuse lesions that a network does not read, and the want of those that it does.

        Raises:
            InputError: it reads whole scans; it reads patches and none are given; boxes, which are
                of X-rays, are given for a CT scan.
        """
        flag = "boxes" if self.boxes else "lesion_mask"
        if data.patches == "none" and (self.boxes or self.lesion_mask):
            raise InputError(
                f"--{flag}: is given for {self.path}, but this network reads whole scans, not "
                "patches of lesions: leave it out"
            )
        if data.patches != "none" and not (self.boxes or self.lesion_mask):
            raise InputError(
                f"{self.path}: this network reads patches of lesions, which it does not find: give "
                f"--scan and --lesion_mask{' or --boxes' if data.modality == 'xray' else ''}"
            )
        if self.boxes and data.modality == "ct":
            raise InputError(
                f"--boxes: are of X-rays, and {self.path} is for a network of CT: give "
                "--lesion_mask"
            )


def named(
    name: str,
    path: Path,
    lung_mask: Path | None = None,
    lesion_mask: Path | None = None,
    boxes: Boxes = (),
) -> Request:
    """A request whose result has that name, or a hash of it where the scan is DICOM."""
    name = privacy.pseudonym(path, name) if privacy.is_private(path) else name
    return Request(name, path, lung_mask, lesion_mask, boxes)
