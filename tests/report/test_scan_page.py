"""The page of a scan, without a browser: what it holds, and what it never does."""

import base64
import gzip
import hashlib
import json
import pathlib

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from pages import HOSTILE, RESULT, SHAPE, SPACING, VIEWER, Parsed, chest, volume

from deepsc_jax.report import scan_page as scan_pages
from deepsc_jax.report import volumes
from deepsc_jax.report.scan_page import scan_page
from deepsc_jax.report.scan_tables import Findings
from deepsc_jax.report.viewer_blocks import script_block
from deepsc_jax.runtime.types import JsonObject


@pytest.fixture
def picture(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path / "picture.png"


def write(
    picture: pathlib.Path,
    result: JsonObject = RESULT,
    findings: Findings | None = None,
    title: str = "a scan",
    hu: bool = True,
) -> str:
    values, lung, found = chest()
    path = picture.with_name("report.html")
    scan_page(
        path,
        VIEWER,
        values if hu else values + 1000,
        lung,
        found if findings is None else findings,
        result,
        spacing_mm=SPACING,
        title=title,
        picture=picture,
        hu=hu,
    )
    return path.read_text("utf-8")


def letters(page: Parsed) -> int:
    """How long a page's volumes are."""
    return sum(
        len(page.block(f"volume-{v['name']}")) for v in json.loads(page.block("scan"))["volumes"]
    )


def limit(monkeypatch: pytest.MonkeyPatch, page: Parsed, picture: pathlib.Path) -> None:
    """Have pages be smaller than this one."""
    others = len(script_block(VIEWER)) + len(scan_pages._fallback(picture))
    most = letters(page) + others + scan_pages.SMALL_PARTS - 1
    monkeypatch.setattr(volumes, "MOST_BYTES", most)


def test_volumes_are_the_scan_cut_to_the_lungs_and_turned_to_right_front_head(
    picture: pathlib.Path,
) -> None:
    values, _, findings = chest()
    page = Parsed(write(picture))
    scan = json.loads(page.block("scan"))
    # a margin of 10 mm is 2, 5 and 4 voxels (4, 2 and 2.5 mm; of the half the even one)
    assert scan["start"] == [3, 4, 6]
    assert scan["stop"] == [22, 38, 44]
    part = (slice(3, 22), slice(4, 38), slice(6, 44))
    image = volume(page, "ct")
    assert image.header.get_zooms() == (2.5, 2.0, 4.0)
    assert image.get_data_dtype() == np.uint8
    expected = values[part][:, ::-1, ::-1].T
    step = (500 + 1024) / 255
    np.testing.assert_allclose(np.asarray(image.dataobj), expected, atol=step / 2 + 1e-3)
    assert findings.lesion_mask is not None
    lesion = np.asarray(volume(page, "lesion").dataobj)
    np.testing.assert_array_equal(lesion > 0.5, findings.lesion_mask[part][:, ::-1, ::-1].T)
    assert findings.evidence is not None
    evidence = np.asarray(volume(page, "evidence").dataobj)
    expected = findings.evidence[part][:, ::-1, ::-1].T
    np.testing.assert_allclose(evidence, expected, atol=0.5 / 255 + 1e-6)


def test_volumes_of_other_steps_share_the_corner_of_the_cut() -> None:
    array = np.zeros((10, 11, 13), np.uint8)
    array[4:6, 6:8, 8:10] = 200
    corners = []
    for step in ((1, 1, 1), (2, 2, 2)):
        content = volumes.encoded(volumes.coarser(array, step).astype(np.uint8), step)
        image = nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(content)))
        inside = np.argwhere(np.asarray(image.dataobj) > 100)
        ends = inside.min(axis=0) - 0.5, inside.max(axis=0) + 0.5
        corners.append([apply_affine(image.affine, end) for end in ends])
    # from the corner: 8 to 10 mm to the left, 6 to 8 backwards, 4 to 6 up
    np.testing.assert_allclose(corners, [[[-10, -8, 4], [-8, -6, 6]]] * 2)


def test_lesions_are_listed_largest_first_with_what_is_measured_of_them(
    picture: pathlib.Path,
) -> None:
    page = Parsed(write(picture))
    buttons = [attrs for tag, attrs in page.tags if tag == "button" and "data-at" in attrs]
    places = [json.loads(button["data-at"] or "") for button in buttons]
    _, _, findings = chest()
    assert findings.lesion_mask is not None
    assert all(findings.lesion_mask[tuple(place)] for place in places)
    assert places[0][0] >= 15
    assert places[1][0] <= 8
    start = page.texts.index("1")
    # 4 × 8 × 8 voxels of 0.02 ml; −300 and the mean of the columns 30 to 37
    assert page.texts[start + 1 : start + 4] == ["5.12", "16 × 16 × 20", "−266"]
    assert page.texts[start + 4] == str(places[0][0] + 1)
    assert json.loads(page.block("scan"))["at"] == places[0]


def test_the_policy_knows_the_scripts_that_run_and_lets_no_other(picture: pathlib.Path) -> None:
    page = Parsed(write(picture))
    (policy,) = [a["content"] for t, a in page.tags if a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; ")
    run = [text for attributes, text in page.scripts if "type" not in attributes]
    viewer = gzip.decompress(base64.b64decode(page.block("viewer-script"))).decode()
    assert viewer == VIEWER.script
    for script in [*run, viewer]:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy
    assert "http:" not in policy
    assert "https:" not in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]


def test_nothing_is_asked_of_any_network(picture: pathlib.Path) -> None:
    addresses = [
        value or ""
        for _, attributes in Parsed(write(picture)).tags
        for key, value in attributes.items()
        if key in ("src", "href", "srcset", "data", "action")
    ]
    assert addresses
    assert all(address.startswith("data:") for address in addresses)


def test_names_are_shown_and_neither_run_nor_end_a_block(picture: pathlib.Path) -> None:
    plain = Parsed(write(picture))
    hostile = RESULT | {
        "probabilities": {HOSTILE: 0.9, "b": 0.1},
        "class": HOSTILE,
        "notes": [HOSTILE],
        "trained_on": HOSTILE,
    }
    page = Parsed(write(picture, hostile, title=HOSTILE))
    assert len(page.scripts) == len(plain.scripts)
    assert not any("onerror" in attributes for _, attributes in page.tags)
    assert [t for t, _ in page.tags].count("img") == 1
    said = HOSTILE.replace("\u202e\n", "\\u202e\\n")
    assert [text for text in page.texts if said in text]
    assert "\u202e" not in "".join(page.texts)


def test_a_page_that_would_be_too_large_is_coarser_and_says_so(
    picture: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Parsed(write(picture))
    assert "Shown" not in page.texts
    limit(monkeypatch, page, picture)
    page = Parsed(write(picture))
    scan = json.loads(page.block("scan"))
    assert scan["step"] == [1, 2, 2]  # 4 × 2 × 2.5 mm: its slices are further apart
    image = volume(page, "ct")
    assert image.shape == tuple(reversed(scan["shape"]))
    assert image.header.get_zooms() == (5.0, 4.0, 4.0)
    assert "one voxel for 1 × 2 × 2 of the scan, to keep the page small" in page.texts
    limit(monkeypatch, page, picture)
    page = Parsed(write(picture))
    assert json.loads(page.block("scan"))["step"] == [2, 4, 4]


@pytest.mark.parametrize("kind", ["lesions", "classes", "nothing found"])
def test_a_network_of_one_task_has_a_page_of_that_task(picture: pathlib.Path, kind: str) -> None:
    _, lung, found = chest()
    lesions = ["lesion_ml", "lesion_share_of_lung", "lesion_threshold"]
    absent = {"lesions": ["class", "probabilities"], "classes": lesions, "nothing found": []}[kind]
    result = {key: value for key, value in RESULT.items() if key not in absent}
    findings = {
        "lesions": Findings(found.lesion_mask, found.lesion_probability),
        "classes": Findings(evidence=found.evidence),
        "nothing found": Findings(np.zeros_like(lung), np.zeros(SHAPE, np.float32)),
    }[kind]
    page = Parsed(write(picture, result, findings))
    names = [each["name"] for each in json.loads(page.block("scan"))["volumes"]]
    has = {"lesions": ["lesion", "probability"], "classes": ["evidence"]}
    assert names == ["ct", *has.get(kind, ["lesion", "probability"])]
    assert ("Probability of each class" in page.texts) == (kind != "lesions")
    assert ("LVR" in page.texts) == (kind != "classes")
    assert ("PLR" in page.texts) == (kind == "lesions")
    assert ("None." in page.texts) == (kind == "nothing found")


def test_an_image_that_is_not_in_hu_has_no_windows_of_hu(picture: pathlib.Path) -> None:
    page = Parsed(write(picture, hu=False))
    assert "Window" not in page.texts
    assert not any("HU" in text for text in page.texts)
    assert json.loads(page.block("scan"))["volumes"][0]["unit"] == ""


def test_the_licence_of_the_viewer_and_the_warning_are_in_the_page(picture: pathlib.Path) -> None:
    texts = Parsed(write(picture)).texts
    assert "Licence <of> the viewer" in texts
    assert "Research use only, not for clinical use" in texts


def test_the_same_scan_has_the_same_page(picture: pathlib.Path) -> None:
    assert write(picture) == write(picture)
