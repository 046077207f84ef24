"""An HTML page in one file, which asks nobody for anything.

Its content security policy names the scripts that may run, by their sums, and forbids the network.
So what a scan, a class or a file is called can neither run nor load: it is escaped as well.
"""

import base64
import hashlib
import html
import importlib.resources
import json
import os
import pathlib
from collections.abc import Sequence

from deepsc_jax.report.pictures import NOT_CLINICAL
from deepsc_jax.runtime.names import shown
from deepsc_jax.runtime.types import JsonValue


def text(name: str | os.PathLike[str]) -> str:
    """A name of a user's as a page shows it, in its text and in a quoted attribute."""
    return html.escape(shown(name))


def asset(name: str) -> str:
    """A file of `report/assets/`."""
    return (importlib.resources.files("deepsc_jax.report") / "assets" / name).read_text("utf-8")


def image(file: pathlib.Path) -> str:
    """A PNG file as an address for `src`."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"


def data(name: str, value: JsonValue) -> str:
    """A block of JSON that a script of the page reads by its id; nothing in it ends the block."""
    content = json.dumps(value, allow_nan=False, ensure_ascii=True)
    for letter in "<>&":
        content = content.replace(letter, f"\\u{ord(letter):04x}")
    return f'<script type="application/json" id="{name}">{content}</script>'


def document(title: str, body: str, script: str, *, loaded: Sequence[str] = ()) -> str:
    """A whole page.

    Args:
      title: of it, as a user's name may be.
      body: HTML.
      script: that runs at its end.
      loaded: scripts that it adds to the page itself, and which may run too.
    """
    sums = " ".join(f"'sha256-{_sum(each)}'" for each in (script, *loaded))
    policy = (
        f"default-src 'none'; script-src {sums} 'wasm-unsafe-eval'; style-src 'unsafe-inline'; "
        "img-src data: blob:; connect-src data: blob:; font-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{text(title)}</title>
<style>
{asset("page.css")}</style>
</head>
<body>
<header>
<h1>{text(title)}</h1>
<p class="warning" role="note">{html.escape(NOT_CLINICAL.capitalize())}</p>
</header>
{body}
<script>{script}</script>
</body>
</html>
"""


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int, name: str = ""
) -> str:
    """A table; the cells are HTML, and the last `numbers` columns are figures."""
    plain = len(head) - numbers

    def line(cells: Sequence[str], tag: str) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        kinds = [scope if i < plain else f'{scope} class="number"' for i in range(len(cells))]
        pairs = zip(cells, kinds, strict=True)
        return "".join(f"<{tag}{kind}>{cell}</{tag}>" for cell, kind in pairs)

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    marked = f' id="{name}"' if name else ""
    return (
        f'<div class="wide"><table{marked}><thead><tr>{line(head, "th")}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A list of facts and their values, which are HTML."""
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in pairs) + "</dl>"


def _sum(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
