"""What mkdocs does besides: references in docstrings become links, and every public name must be on a page.

A hook of mkdocs, and an extension of what reads the docstrings, both named in mkdocs.yml. The sources are not imported,
so that the pages build without PyTorch.
"""

from __future__ import annotations

import ast
import logging
import re
from pathlib import Path
from typing import Any

from griffe import Extension

ROOT = Path(__file__).parents[1]
MODULES = (
    "linnet", "linnet.evaluation", "linnet.interop.convert", "linnet.interop.torchtitan", "linnet.interop.transformers",
    "linnet.mixers", "linnet.models", "linnet.ops", "linnet.ops.core", "linnet.ops.lti", "linnet.parallel",
    "linnet.parallel.ops", "linnet.presets", "linnet.reproductions", "linnet.tasks", "linnet.training",
)  # fmt: skip
SECTION = re.compile(r"^(?:Args|Attributes):\n(?:(?: .*)?\n?)+", re.MULTILINE)
SHARED = re.compile(r"^( +)(\w+(?:, \w+)+): (.*(?:\n\1 +.*)*)", re.MULTILINE)
SESSION = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(~?)([\w.]+)</code>")

log = logging.getLogger("mkdocs.hooks.pages")


class Docstrings(Extension):
    """Docstrings as the pages understand them."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """One entry for each of the names that share one, no mark in front of literal blocks, sessions as code."""
        if obj.docstring is not None:
            text = re.sub(r" ?::$", ":", obj.docstring.value, flags=re.MULTILINE)
            text = SESSION.sub(r"\1```pycon\n\g<0>\n\1```", text)
            obj.docstring.value = SECTION.sub(lambda found: SHARED.sub(_apart, found[0]), text)


def _apart(found: re.Match[str]) -> str:
    return "\n".join(f"{found[1]}{name}: {found[3]}" for name in found[2].split(", "))


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx roles as code, linked where what they name is on the same page."""
    places: dict[str, list[str]] = {}
    for place in re.findall(r'<h\d id="(linnet\.[\w.]+)"', html):
        places.setdefault(place.rpartition(".")[2], []).append(place)

    def link(found: re.Match[str]) -> str:
        name = found[2].rpartition(".")[2]
        code = f"<code>{name if found[1] else found[2]}</code>"
        there = places.get(name, [])
        return f'<a href="#{there[0]}">{code}</a>' if len(there) == 1 else code

    return ROLE.sub(link, html)


def on_post_build(config: Any, **_: Any) -> None:
    """Warn, which strict builds do not forgive, of public names without an entry."""
    pages = Path(config["site_dir"], "api").rglob("*.html")
    places = [place for page in pages for place in re.findall(r'id="(linnet\.[\w.]+)"', page.read_text("utf-8"))]
    for module in MODULES:
        for name in public(module):
            if not any(place.startswith(f"{module}.") and place.endswith(f".{name}") for place in places):
                log.warning("%s.%s is on none of the pages in docs/api", module, name)


def public(module: str) -> list[str]:
    """``__all__`` of a module, without the version and what is itself a room."""
    path = ROOT.joinpath("src", *module.split("."))
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            names = ast.literal_eval(node.value)
            rooms = {room.name for room in (ROOT / "src" / "linnet").iterdir()} if module == "linnet" else set()
            return [name for name in names if name != "__version__" and name not in rooms]
    raise ValueError(f"{source}: expected a list __all__")
