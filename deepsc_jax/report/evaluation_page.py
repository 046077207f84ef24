"""The page of an evaluation: its figures, and every scan, the worst first."""

import html
import math
import os
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from deepsc_jax import __version__
from deepsc_jax.metrics.paired import rows_of_table
from deepsc_jax.metrics.scan_figures import NSD_TOLERANCE_MM
from deepsc_jax.metrics.tables import table as printed
from deepsc_jax.report import evaluation_figures as figures
from deepsc_jax.report.document import asset, document, facts, table, text
from deepsc_jax.runtime.files import own
from deepsc_jax.runtime.names import counted, shown
from deepsc_jax.runtime.types import JsonObject

# Key of a row, its head, decimals.
COLUMNS = {
    "dsc": ("DSC", 3),
    "nsd": (f"NSD, {NSD_TOLERANCE_MM:g} mm", 3),
    "hd95_mm": ("HD95, mm", 1),
    "rmsd_mm": ("RMSD, mm", 1),
    "lesion_ml": ("Lesion, ml", 1),
    "predicted_ml": ("Predicted, ml", 1),
    "false_positive_ml": ("False, ml", 1),
}
ORDER = (
    "Worst first: scans given another class, then those with lesions by their DSC, then those "
    "without by what was marked in them. A column's head sorts by it."
)
AGAINST = (
    "This evaluation less the other, of the same scans. The paired bootstrap resamples patients; "
    "Holm's p are over all rows of a table."
)


def evaluation_page(
    path: str | os.PathLike[str],
    metrics: JsonObject,
    rows: Sequence[JsonObject],
    links: Mapping[str, str],
    *,
    title: str,
) -> None:
    """Write the page of an evaluation; a file that was not written here is not replaced.

    Args:
      path: of the page.
      metrics: what metrics.json holds.
      rows: what scans.json holds.
      links: the address of each case's page that there is.
      title: what was evaluated.

    Raises:
      InputError: what is at `path` was written or changed by somebody else.
    """
    body = "\n".join(
        [
            '<main class="one">',
            f'<div class="panels"><section><h2>Figures</h2>{_printed(metrics)}</section>',
            f"<div>{_confusion(metrics)}{_made_from(metrics, len(rows))}</div></div>",
            _against(metrics),
            f"<section><h2>Curves</h2>{_panels(rows)}</section>",
            f"<section><h2>Scans</h2>{_scans(sorted(rows, key=badness), links)}</section>",
            "</main>",
        ]
    )
    with own(pathlib.Path(path)) as partial:
        partial.write_text(document(title, body, asset("evaluation.js")), "utf-8")


def badness(row: JsonObject) -> tuple[bool, bool, float]:
    """A key that sorts the worst scan to the front, as `ORDER` says."""
    score = row.get("dsc")
    rest = -row.get("false_positive_ml", 0.0) if score is None else score
    return not _is_wrong(row), score is None, rest


def given_class(row: JsonObject) -> str | None:
    """The most probable class of a scan; None where the network gives none."""
    probabilities = row.get("probabilities")
    return max(probabilities, key=lambda c: probabilities[c]) if probabilities else None


def _is_wrong(row: JsonObject) -> bool:
    given = given_class(row)
    return given is not None and given != row["label"]


def _scans(rows: Sequence[JsonObject], links: Mapping[str, str]) -> str:
    """The table that its heads sort."""
    classes = any("probabilities" in row for row in rows)
    columns = {key: v for key, v in COLUMNS.items() if any(key in row for row in rows)}
    heads = ["Scan", "Class", *(["Given", "Probability"] if classes else [])]
    numbers = len(columns) + classes
    heads += [head for head, _ in columns.values()]
    head = "".join(
        f'<th scope="col"{_kind(index, len(heads), numbers)}>'
        f'<button type="button">{name}</button></th>'
        for index, name in enumerate(heads)
    )
    body = "\n".join(_row(row, links, columns, classes=classes) for row in rows)
    return (
        f'<p class="note" id="order">{ORDER}</p><div class="wide"><table id="scans" '
        f'aria-describedby="order"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>"
    )


def _kind(index: int, count: int, numbers: int) -> str:
    return ' class="number"' if index >= count - numbers else ""


def _row(
    row: JsonObject,
    links: Mapping[str, str],
    columns: Mapping[str, tuple[str, int]],
    *,
    classes: bool,
) -> str:
    name = text(row["case"])
    if row["case"] in links:
        name = f'<a href="{html.escape(links[row["case"]])}">{name}</a>'
    cells = [f"<td>{name}</td>", f"<td>{text(row['label'])}</td>"]
    if classes:
        given = given_class(row)
        wrong = " <strong>✗ wrong</strong>" if _is_wrong(row) else ""
        cells.append(f"<td>{'–' if given is None else text(given)}{wrong}</td>")
        cells.append(_figure(None if given is None else row["probabilities"][given], 3))
    cells += [_figure(row.get(key), decimals) for key, (_, decimals) in columns.items()]
    return f"<tr>{''.join(cells)}</tr>"


def _figure(value: float | None, decimals: int) -> str:
    """A cell that is sorted by its value and not by what stands in it."""
    if value is None or math.isnan(value):
        return '<td class="number">–</td>'
    return f'<td class="number" data-value="{value!r}">{value:.{decimals}f}</td>'


def _panels(rows: Sequence[JsonObject]) -> str:
    panels = []
    with_classes = [row for row in rows if "probabilities" in row]
    if with_classes:
        classes = list(with_classes[0]["probabilities"])
        labels = np.array([classes.index(row["label"]) for row in with_classes])
        probabilities = np.array([list(row["probabilities"].values()) for row in with_classes])
        panels = [
            (figures.roc(labels, probabilities, classes), "ROC, each class against the others"),
            (
                figures.precision_recall(labels, probabilities, classes),
                "Precision and recall, each class against the others; average precision",
            ),
            (
                figures.reliability_curve(labels, probabilities),
                "Reliability: on the line, probabilities are as often right as they say",
            ),
        ]
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row.get("dsc") is not None:
            scores.setdefault(row["label"], []).append(row["dsc"])
    if scores:
        panels.append(
            (figures.dice_distribution(scores), "DSC of each scan with lesions, and its quartiles")
        )
    drawn = "".join(
        f'<figure><img src="{source}" alt="{said}"><figcaption>{said}</figcaption></figure>'
        for source, said in panels
    )
    return f'<div class="panels">{drawn}</div>'


def _confusion(metrics: JsonObject) -> str:
    """Rows: what scans are; columns: what they are given. Shades repeat the numbers."""
    if "classes" not in metrics:
        return ""
    names, counts = metrics["classes"]["classes"], metrics["classes"]["confusion"]
    head = "".join(f'<th scope="col" class="number">given {text(name)}</th>' for name in names)
    lines = []
    for index, (name, line) in enumerate(zip(names, counts, strict=True)):
        total = max(sum(line), 1)
        cells = "".join(
            f'<td class="number" style="background:rgb(0 114 178 / {0.55 * count / total:.2f})">'
            f"{'<strong>' if place == index else ''}{count}{'</strong>' if place == index else ''}"
            "</td>"
            for place, count in enumerate(line)
        )
        lines.append(f'<tr><th scope="row">is {text(name)}</th>{cells}</tr>')
    return (
        '<section><h2>Confusion</h2><div class="wide"><table id="confusion"><thead><tr><td></td>'
        f"{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _against(metrics: JsonObject) -> str:
    """The comparison with another evaluation of the same scans, where there was one."""
    if "against" not in metrics:
        return ""
    found = metrics["against"]
    parts = [
        f"<section><h2>Against {text(found['name'])}</h2>",
        f'<p class="note">{html.escape(AGAINST)}</p>',
    ]
    for key, name in (("rows", "against"), ("evidence", "against-evidence")):
        if found[key]:
            head, *rows = rows_of_table(found[key])
            cells = [[html.escape(shown(cell)) for cell in row] for row in rows]
            parts.append(table([html.escape(each) for each in head], cells, numbers=7, name=name))
    parts += [f'<p class="note">Left out: {text(each)}</p>' for each in found["left_out"]]
    return "".join([*parts, "</section>"])


def _made_from(metrics: JsonObject, scans: int) -> str:
    pairs = [("Scans", str(scans)), ("Evaluated on", text(str(metrics["evaluated_on"])))]
    pairs.append(("Trained on", text(str(metrics["trained_on"]))))
    plain = [
        (text(key.replace("_", " ")), text(str(value)))
        for key, value in metrics.items()
        if isinstance(value, str | int | float) and key not in ("trained_on", "evaluated_on")
    ]
    pairs += [*plain, ("Program", f"deepsc_jax {__version__}")]
    missed = metrics.get("lesions", {}).get("missed")
    if missed is not None:
        pairs.insert(1, ("Missed", f"{counted(missed, 'scan')} with lesions and nothing marked"))
    return f"<section><h2>Made from</h2>{facts(pairs)}</section>"


def _printed(metrics: JsonObject) -> str:
    """The table that the command prints."""
    lines = "\n".join(html.escape(shown(line)) for line in printed(metrics).splitlines())
    return f'<pre class="figures">{lines}</pre>'
