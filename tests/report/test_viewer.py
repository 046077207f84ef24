"""The viewer from its wheel."""

import importlib.metadata
import pathlib
from collections.abc import Iterator

import pytest

from deepsc_jax.report import viewer

WIDGET = (
    'async initialize({model:A}){if(!W){console.log("Creating new Niivue instance");let B='
    'A.get("opts")??{},g=T(B);W=new b$E(g)}}export{w as default};'
)


@pytest.fixture
def wheel(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """A folder in which a wheel of that name is installed, and no other is seen."""
    about = tmp_path / "ipyniivue-2.4.7.dist-info"
    (about / "licenses").mkdir(parents=True)
    (tmp_path / "ipyniivue" / "static").mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.4\nName: ipyniivue\nVersion: 2.4.7\n")
    (about / "licenses" / "LICENSE").write_text("may be used\n")
    (tmp_path / "ipyniivue" / "static" / "widget.js").write_text(WIDGET)
    names = ["ipyniivue/static/widget.js", f"{about.name}/licenses/LICENSE"]
    (about / "RECORD").write_text("".join(f"{name},,\n" for name in names))
    found = importlib.metadata.Distribution.at(about)
    monkeypatch.setattr(importlib.metadata, "distribution", {viewer.WHEEL: found}.__getitem__)
    viewer.installed.cache_clear()
    yield about
    viewer.installed.cache_clear()


def test_a_line_hands_the_viewers_class_to_the_page(wheel: pathlib.Path) -> None:
    found = viewer.installed()
    assert found is not None
    assert found.script == f"{WIDGET}\nglobalThis.Niivue = b$E;\n"
    assert found.licence == "may be used"
    assert found.name == "NiiVue (ipyniivue 2.4.7)"


@pytest.mark.parametrize("change", ["version", "script", "licence"])
def test_a_wheel_that_cannot_be_driven_counts_as_none(wheel: pathlib.Path, change: str) -> None:
    if change == "version":
        metadata = wheel / "METADATA"
        metadata.write_text(metadata.read_text("utf-8").replace("2.4.7", "2.40.0"))
    elif change == "script":
        (wheel.parent / "ipyniivue" / "static" / "widget.js").write_text("export{w as default};")
    else:
        (wheel / "RECORD").write_text("ipyniivue/static/widget.js,,\n")
    assert viewer.installed() is None


def test_no_wheel_is_no_viewer(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    viewer.installed.cache_clear()
    assert viewer.installed() is None
    viewer.installed.cache_clear()
