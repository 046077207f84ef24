"""Pictures: what they choose to show, and that every kind of run gets one."""

import json
import os

import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from deepsc_jax.report import pictures
from deepsc_jax.report.figures import drawn
from deepsc_jax.report.pictures import loss_curves, scan_picture, telling_slices
from deepsc_jax.runtime.errors import InputError

SHAPE = (20, 24, 32)
PROBABILITIES = {"covid-19": 0.8, "cap": 0.15, "non-pneumonia": 0.05}


@pytest.fixture
def scan():
    """values, lung mask and lesion mask of a box-shaped chest."""
    lung, lesion = np.zeros((2, *SHAPE), bool)
    lung[4:16, 6:18, 4:28] = True
    lesion[6:9, 8:12, 6:10] = True
    lesion[13, 8:10, 20:24] = True
    values = np.where(lung, -850.0, 40.0).astype(np.float32)
    values[lesion] = -500
    return values, lung, lesion


def test_the_largest_lesions_slices_are_shown_and_the_distant_small_one(scan):
    _, lung, lesion = scan
    shown = telling_slices(lesion, None, lung, SHAPE[0], 4)
    assert len(shown) == 4
    assert shown == sorted(shown, reverse=True)
    assert {6, 7, 8, 13} == set(shown)


def test_without_lesions_strong_evidence_decides(scan):
    _, lung, lesion = scan
    heat = np.full(SHAPE, 0.1, np.float32)
    heat[11, 10, 10] = 1
    assert 11 in telling_slices(np.zeros_like(lesion), heat, lung, SHAPE[0], 4)


def test_where_nothing_was_found_slices_spread_over_the_lungs(scan):
    _, lung, lesion = scan
    nothing = np.zeros_like(lesion)
    assert telling_slices(nothing, None, lung, SHAPE[0], 4) == [14, 11, 8, 5]
    assert telling_slices(nothing, None, None, SHAPE[0], 4) == [17, 12, 7, 2]


def test_a_picture_says_how_it_is_read(tmp_path, scan, monkeypatch):
    values, lung, lesion = scan
    found = []
    monkeypatch.setattr(pictures, "save_png", lambda figure, _: found.extend(figure.findobj(Text)))
    scan_picture(
        tmp_path / "a.png",
        values,
        None,
        lesion,
        lesion.astype(np.float32),
        {"covid-19": 0.1, "cap": 0.9},
        spacing_mm=(5.0, 2.0, 1.5),
        title="case_001",
        lung_mask=lung,
        threshold=0.45,
        lungs="found",
    )
    texts = [text.get_text() for text in found]
    for text in (
        "evidence_1 for community-acquired pneumonia;\nrelative: 1 is this scan's most",
        "black to white: −1000 to 200 HU; slices are counted from the lowest",
        "predicted lesion: probability at least 0.45; lung mask: found",
        "community-acquired pneumonia",
    ):
        assert text in texts, texts
    bold = [text.get_text() for text in found if text.get_fontweight() == "bold"]
    assert set(bold) == {"case_001", "R", "L"}


@pytest.mark.parametrize("depth", [1, 3, 4])
def test_a_scan_of_few_slices_shows_them_all(depth):
    mask = np.zeros((depth, 5, 5), bool)
    mask[0] = True
    assert telling_slices(mask, None, None, depth, 4) == list(range(depth))[::-1]


@pytest.mark.parametrize("run", ["joint", "segmentation", "classification", "nothing found"])
def test_every_kind_of_run_gets_a_picture(tmp_path, scan, run):
    values, lung, lesion = scan
    heat = lesion.astype(np.float32)
    if run == "nothing found":
        lesion, heat = np.zeros_like(lesion), np.zeros_like(heat)
    path = tmp_path / "scan.png"
    scan_picture(
        path,
        values,
        None if run == "classification" else heat,
        None if run == "classification" else lesion,
        None if run == "segmentation" else heat,
        None if run == "segmentation" else PROBABILITIES,
        spacing_mm=(5.0, 2.0, 1.5),
        title="case_001",
        truth=None if run == "classification" else lesion,
        lung_mask=lung,
        trained_on="phantoms",
    )
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] == 1600
    assert [file.name for file in tmp_path.iterdir()] == ["scan.png"]


def test_lesions_are_drawn_in_their_colour(tmp_path, scan):
    values, _, lesion = scan
    orange = np.array([230, 159, 0]) / 255

    def orange_pixels(mask):
        scan_picture(
            tmp_path / "a.png", values, None, mask, None, None, spacing_mm=(5, 2, 2), title="a"
        )
        picture = matplotlib.image.imread(tmp_path / "a.png")[..., :3]
        return np.count_nonzero(np.abs(picture - orange).max(axis=-1) < 0.02)

    # the legend has the colour too, so the outline's pixels come on top of it
    assert orange_pixels(lesion) > 2 * orange_pixels(np.zeros_like(lesion))


def test_a_scan_of_one_slice_without_lung_mask(tmp_path, scan):
    values, _, lesion = scan
    path = tmp_path / "one.png"
    scan_picture(
        path,
        values[:1],
        None,
        lesion[:1],
        None,
        PROBABILITIES,
        spacing_mm=(5.0, 2.0, 1.5),
        title="x" * 300,
    )
    assert path.stat().st_size > 0


@pytest.mark.parametrize(
    "name",
    ["$_$", "$x$", r"\$", "a$b", "$$", "病人", "\x1b[2J", "a\nb", "gr\udcf6\udcdfe", "x" * 300],
)
def test_names_are_drawn_as_they_are_shown(tmp_path, scan, name, recwarn):
    values, _, lesion = scan
    classes = {name: 0.9, "other": 0.1}
    scan_picture(
        tmp_path / "a.png",
        values,
        None,
        lesion,
        lesion.astype(np.float32),
        classes,
        spacing_mm=(5, 2, 2),
        title=name,
    )
    assert [str(warning.message) for warning in recwarn] == []  # of a glyph that is missing


def test_no_part_of_a_name_is_mathematics():
    def pixels(text, **options):
        figure = Figure(figsize=(4, 1))
        figure.text(0.1, 0.5, text, **options)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())

    for name in ("$x$", "a$b", r"\$x\$", r"$\frac$"):
        np.testing.assert_array_equal(pixels(drawn(name)), pixels(name, parse_math=False))
    assert not np.array_equal(pixels("$x$"), pixels(drawn("$x$")))
    assert drawn("größe 病") == r"größe \u75c5"


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_curves_of_all_stages_with_a_last_line_cut_short(tmp_path):
    log = tmp_path / "metrics.jsonl"
    lines = [
        {"stage": stage, "step": step, "loss": 1 / step, "dice": 0.5 / step}
        for stage in ("segmentation", "joint")
        for step in range(1, 90)
    ]
    write_lines(log, [*lines, {"stage": "joint", "step": 90, "validation_dsc": 0.5}])
    log.write_text(log.read_text("utf-8") + '{"stage": "joint", "st')
    loss_curves(tmp_path / "curves.png", log)
    assert matplotlib.image.imread(tmp_path / "curves.png").shape[1] > 1000


def test_curves_of_a_run_of_one_step_without_validation(tmp_path):
    write_lines(tmp_path / "m.jsonl", [{"stage": "classification", "step": 10, "loss": 1.0}])
    loss_curves(tmp_path / "curves.png", tmp_path / "m.jsonl")
    assert (tmp_path / "curves.png").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file: expected the metrics.jsonl"),
        ("", "holds no loss"),
        ('{"stage": "joint", "step": 1, "validation_dsc": 0.1}\n', "holds no loss"),
        ('garbage\n{"stage": "joint", "step": 1, "loss": 0.1}\n', "line 1 is 'garbage'"),
        ('[1]\n{"stage": "joint", "step": 1, "loss": 0.1}\n', r"line 1 is '\[1\]'"),
        ('{"stage": 1, "step": "x"}\n{"stage": "joint", "step": 1, "loss": 0.1}\n', "line 1 is"),
        ("\udcff\udcfe\n{}\n", "line 1 is '.*': expected JSON"),
    ],
)
def test_a_log_without_curves_is_named(tmp_path, content, message):
    log = tmp_path / "metrics.jsonl"
    if content is not None:
        log.write_bytes(os.fsencode(content))
    with pytest.raises(InputError, match=message) as error:
        loss_curves(tmp_path / "curves.png", log)
    assert str(log) in str(error.value)
    assert not (tmp_path / "curves.png").exists()
