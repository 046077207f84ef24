"""Pages as tests read them, and a chest to make one of."""

import base64
import gzip
from html.parser import HTMLParser
from typing import Any

import nibabel as nib
import numpy as np

from deepsc_jax.report.scan_tables import Findings
from deepsc_jax.report.viewer import Viewer

VIEWER = Viewer("globalThis.Niivue = class {};\n", "Licence <of> the viewer", "a viewer 1.0")
SHAPE, SPACING = (24, 40, 48), (4.0, 2.0, 2.5)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\n"
RESULT: dict[str, Any] = {
    "sha256": "ab" * 32,
    "lung_mask_sha256": None,
    "lung_ml": 120.0,
    "lesion_ml": 3.5,
    "lesion_share_of_lung": 0.0291,
    "lesion_threshold": 0.45,
    "stage": "joint",
    "trained_on": "phantoms",
    "class": "cap",
    "probabilities": {"covid-19": 0.2, "cap": 0.7, "non-pneumonia": 0.1},
    "made_from": {"network": "cd" * 32},
    "notes": [],
}


def chest() -> tuple[np.ndarray, np.ndarray, Findings]:
    """Values in HU, a lung mask that leaves a border free, and findings: two lesions in it."""
    lung, lesion = np.zeros((2, *SHAPE), bool)
    lung[5:20, 9:33, 10:40] = True
    lesion[6:9, 12:16, 12:16] = True  # lower, in front, on the patient's right
    lesion[15:19, 22:30, 30:38] = True  # upper, behind, on the left, the larger
    values = np.where(lung, -850.0, 40.0).astype(np.float32)
    values[lesion] = -300
    values += np.arange(SHAPE[2], dtype=np.float32)  # no two sides are alike
    evidence = np.where(lung, np.linspace(0, 1, SHAPE[0])[:, None, None], 0).astype(np.float32)
    return values, lung, Findings(lesion, lesion * np.float32(0.9), evidence)


class Parsed(HTMLParser):
    """Tags with their attributes, the texts, and what each script and style holds."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._inside = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            attributes, before = self.scripts[-1]
            self.scripts[-1] = attributes, before + data
        elif self._inside != "style" and data.strip():
            self.texts.append(data.strip())

    def block(self, name: str) -> str:
        """What the script of that id holds."""
        (content,) = [text for attributes, text in self.scripts if attributes.get("id") == name]
        return content


def volume(page: Parsed, name: str) -> nib.Nifti1Image:
    """A volume of a page, as another program reads it."""
    content = gzip.decompress(base64.b64decode(page.block(f"volume-{name}")))
    return nib.Nifti1Image.from_bytes(content)
