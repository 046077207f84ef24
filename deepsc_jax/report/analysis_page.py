"""The page of an analysis: the paper's section III beside the user's data, and its figures."""

import html
import os
import pathlib
from collections.abc import Mapping, Sequence

from deepsc_jax import __version__
from deepsc_jax.metrics.cohort import FIGURES, PEAKS, PERCENTILES, Cohort
from deepsc_jax.report import analysis_figures as figures
from deepsc_jax.report.document import document as page_of
from deepsc_jax.report.document import facts, table, text
from deepsc_jax.runtime.files import own
from deepsc_jax.runtime.names import counted
from deepsc_jax.runtime.types import JsonObject

FINDINGS = {
    1: "Lesions of COVID-19 are more than those of CAP",
    2: "Their volume is larger, and their sizes vary more",
    3: "Lesions of COVID-19 are mainly of low density, those of CAP of low or high",
    4: "Lesions of COVID-19 are scattered and peripheral, those of CAP together and central",
}
NOTES = (
    "The paper: Wang et al., IEEE TMI 2021, section III.B, 1,334 scans of COVID-19 and CAP with "
    "lesions drawn by radiologists.",
    "Lesions are 26-connected components of the mask. Figures are over scans with lesions; how "
    "many have none stands below.",
    f"A span lies between the {PERCENTILES[0]:g}th and {PERCENTILES[1]:g}th percentile of lesions, "
    'for the paper\'s "over 90 %". The spread is the root mean square distance of the middles of '
    "the lesions' boxes from their mean; the paper names no unit of its 86.0 and 15.6. The paper "
    "names no thickness of its 62.4 % and 24.5 % either.",
    "Shares of HU and its distribution are of the volume of all scans together.",
)


def analysis_page(
    path: str | os.PathLike[str], document: JsonObject, classes: Mapping[str, Cohort]
) -> None:
    """Write the page of an analysis; a file that was not written here is not replaced.

    Args:
      path: of the page.
      document: what analysis.json holds.
      classes: the scans of each class that has lesions.

    Raises:
      InputError: what is at `path` was written or changed by somebody else.
    """
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in NOTES)
    findings = _findings(document, classes)
    body = "\n".join(
        [
            '<main class="one">',
            f"<section><h2>The paper's findings</h2>{findings}{notes}</section>",
            f"<section><h2>Figures</h2>{_panels(document, classes)}</section>",
            f"<section><h2>Differences</h2>{_differences(document['comparisons'])}</section>",
            f"<section><h2>Made from</h2>{_made_from(document)}</section>",
            "</main>",
        ]
    )
    with own(pathlib.Path(path)) as partial:
        partial.write_text(page_of("Analysis of lesions", body, ""), "utf-8")


def _findings(document: JsonObject, classes: Mapping[str, Cohort]) -> str:
    """A table a finding: the paper's number and the one found, class by class."""
    head = ["Figure"]
    for name in classes:
        head += [f"{text(name)}, paper", f"{text(name)}, here"]
    parts = []
    for number, title in FINDINGS.items():
        rows = [
            _finding(key, document, classes)
            for key, figure in FIGURES.items()
            if figure.finding == number
        ]
        if number == 3:
            rows.append(_peaks(document, classes))
        parts.append(f"<h3>{number}. {title}</h3>")
        parts.append(table(head, rows, numbers=2 * len(classes)))
    return "".join(parts)


def _finding(key: str, document: JsonObject, classes: Mapping[str, Cohort]) -> list[str]:
    figure, cells = FIGURES[key], [html.escape(FIGURES[key].title)]
    for name in classes:
        found = document["classes"][name]["figures"][key]
        here = spelled(found["value"], found["low"], found["high"], figure.digits)
        cells += [figure.paper.get(name.lower(), "") or "–", here]
    return cells


def _peaks(document: JsonObject, classes: Mapping[str, Cohort]) -> list[str]:
    cells = ["peaks of the distribution of HU"]
    for name in classes:
        peaks = document["classes"][name]["hu_peaks"]
        at = f" (at {', '.join(f'{hu:.0f}'.replace('-', '−') for hu in peaks)} HU)" if peaks else ""
        known = document["method"]["intensity"] == "hu"
        cells += [PEAKS.get(name.lower(), "–"), f"{len(peaks)}{at}" if known else "–"]
    return cells


def spelled(value: float | None, low: float | None, high: float | None, digits: int) -> str:
    """A figure with its interval, as a page and a table show it."""
    if value is None:
        return "–"
    ends = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{value:.{digits}f}{ends}".replace("-", "−")


def _panels(document: JsonObject, classes: Mapping[str, Cohort]) -> str:
    panels = [
        (figures.lesion_counts(classes), "(d) Lesions a scan; dotted: the paper's means"),
        (
            figures.lesion_sizes(classes),
            f"(e) Sizes of lesions, at most {figures.SHOWN_LESIONS} of them, drawn at random",
        ),
        (
            figures.lesion_volume_ratios(classes),
            "(g) Lesion volume ratio of scans; dotted: the paper's means",
        ),
        (
            figures.spread_by_ratio(classes, document),
            "(h) Spread by lesion volume ratio, with 95 % intervals; hollow: the paper's",
        ),
        (
            figures.peripheral_ratios(classes, document),
            "(i) Peripheral lesion ratio by thickness, with 95 % intervals; dotted: the paper's, "
            "at a thickness that it does not name",
        ),
    ]
    if document["method"]["intensity"] == "hu":
        panels.insert(
            2, (figures.hu_distribution(classes), "(f) Distribution of CT values in lesions")
        )
    drawn = "".join(
        f'<figure><img src="{source}" alt="{said}"><figcaption>{said}</figcaption></figure>'
        for source, said in panels
    )
    return f'<div class="panels">{drawn}</div>'


def _differences(comparisons: Sequence[JsonObject]) -> str:
    if not comparisons:
        return '<p class="note">One class has lesions: there is nothing to compare.</p>'
    rows = []
    for each in comparisons:
        figure = FIGURES[each["figure"]]
        as_in_paper = {None: "–", True: "as in the paper", False: "<strong>✗ other</strong>"}
        rows.append(
            [
                f"{figure.finding}",
                html.escape(figure.title),
                f"{text(each['first'])} less {text(each['second'])}",
                as_in_paper[each["as_in_paper"]],
                spelled(each["difference"], each["low"], each["high"], figure.digits),
                _p(each["p"]),
                _p(each["p_holm"]),
            ]
        )
    head = ["Finding", "Figure", "Difference of", "Sign", "Difference", "p", "p, Holm's"]
    return table(head, rows, numbers=3, name="differences")


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _made_from(document: JsonObject) -> str:
    pairs = [("Analysed", text(document["analysed"]))]
    for name, found in document["classes"].items():
        said = f"{counted(found['scans'], 'scan')} with lesions"
        if found["scans"]:
            said += f" of {counted(found['patients'], 'patient')}, "
            said += counted(found["lesions"], "lesion")
        said += f"; {found['without_lesions']} without, {found['lesions_unknown']} without a mask"
        pairs.append((text(name), said))
    pairs += [
        (text(key.replace("_", " ")), text(str(value))) for key, value in document["method"].items()
    ]
    return facts([*pairs, ("Program", f"deepsc_jax {__version__}")])
