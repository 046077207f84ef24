"""Pages of the API: one for each folder of the package, made from its docstrings.

A hook of MkDocs. A module that is added appears by itself.
"""

import pathlib
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "deepsc_jax"


def on_config(config: Any) -> Any:
    """Add the pages to the navigation."""
    config.nav.append({"API": [{name: f"api/{name}.md"} for name in _pages()]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages themselves."""
    for name, text in _pages().items():
        files.append(File.generated(config, f"api/{name}.md", content=text))
    return files


def _pages() -> dict[str, str]:
    """Their text by name: the commands, which are the package's own modules, then its folders."""
    modules = sorted(path for path in PACKAGE.glob("*.py") if not path.name.startswith("_"))
    commands = "\n\n".join(f"## {path.stem}\n\n{_directive(path)}" for path in modules)
    folders = sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))
    return {"commands": f"# commands\n\n{commands}\n"} | {
        folder.name: f"# {folder.name}\n\n{_directive(folder)}\n" for folder in folders
    }


def _directive(path: pathlib.Path) -> str:
    return "::: " + ".".join(path.relative_to(ROOT).with_suffix("").parts)
