"""What the documents promise is there: files, anchors, flags; and README stays short."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FRONT = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES = sorted((ROOT / "docs").glob("*.md"))
# Flags that the pages show of other programs and scripts, of every command, and of the model that
# CONTRIBUTING invents.
OTHERS = {
    "budget_s",
    "logdir",
    "array",
    "nodes",
    "rm",
    "user",
    "build-arg",
    "check",
    "flagfile",
    "helpfull",
    "help",
    "version",
    "mynet.OPTION",
}


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    titles = re.findall(r"^#+ (.+)$", path.read_text("utf-8"), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()) for title in titles)
    return {title.replace(" ", "-") for title in plain}


def test_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 130


@pytest.mark.parametrize("path", FRONT, ids=lambda path: path.name)
def test_every_link_of_the_front_pages_leads_somewhere(path: pathlib.Path) -> None:
    links = re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8"))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        page = path.parent / target if target else path
        assert page.exists(), link
        assert not anchor or anchor in anchors(page), link


def test_every_module_that_readme_names_exists() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    modules = re.findall(r"`(deepsc_jax/[\w/]+\.py)`", text)
    rows = re.findall(r"^\| (`\w+/`[^|]*)\|", text, re.MULTILINE)
    folders = re.findall(r"`(\w+/)`", " ".join(rows))
    assert len(modules) >= 5
    assert len(folders) >= 10
    for name in [*modules, *(f"deepsc_jax/{folder}" for folder in folders)]:
        assert (ROOT / name).exists(), name


def test_every_test_that_the_public_reports_name_exists() -> None:
    text = (ROOT / "docs" / "public-reports.md").read_text("utf-8")
    named = re.findall(r"`([\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", text)
    assert len(named) >= 30
    for file, tests in named:
        source = (ROOT / "tests" / file).read_text("utf-8")
        for test in re.findall(r"test_\w+", tests):
            assert f"def {test}(" in source, f"{file}: {test}"


def test_the_documents_show_no_flag_that_does_not_exist() -> None:
    """Flags of the configuration as `train` lists them, and those that a command defines."""
    listed = subprocess.run(
        [sys.executable, "-m", "deepsc_jax.train", "--helpfull"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    ).stdout
    exist = set(re.findall(r"^\s+--(?:\[no\])?([\w.]+):", listed, re.MULTILINE))
    assert {"tile", "workdir"} <= exist
    sources = [path.read_text("utf-8") for path in (ROOT / "deepsc_jax").rglob("*.py")]
    for source in sources:
        exist |= set(re.findall(r"DEFINE_\w+\(\s*\"([\w.]+)\"", source))
    missing = []
    for path in [*FRONT[:2], *PAGES]:
        shown = re.findall(r"(?<![\w-])--([\w.-]*\w)", path.read_text("utf-8"))
        missing += [f"{path.name}: --{name}" for name in shown if name not in exist | OTHERS]
    assert not missing, missing


def test_the_site_builds_without_a_broken_link(tmp_path: pathlib.Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={tmp_path}"],
        capture_output=True,
        encoding="utf-8",
        check=False,
        cwd=ROOT,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "index.html").exists()
    # The API's pages are made from the docstrings: a function of each kind is there.
    assert "dice" in (tmp_path / "api" / "metrics.html").read_text("utf-8")
    assert "DeepSC" in (tmp_path / "api" / "models.html").read_text("utf-8")
