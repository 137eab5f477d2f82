"""A page as one HTML file that needs no network and no font; every text is made visible and escaped.

What the page may do is bound by its own Content-Security-Policy: nothing is loaded from anywhere, and only the one
style sheet and the one script that are named by their hashes count. Markup that slipped through the escaping could
still not run.
"""

import base64
import hashlib
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qlora_trainer.pages.page import Page
from qlora_trainer.pages.visible import visible

FOLDER = Path(__file__).parent / "templates"
TEMPLATE = "page.html.j2"


def render_html(page: Page) -> str:
    """The whole page as HTML."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # For what is markup of our own: the style sheet, the script, and charts that were built as an element tree, so
    # that every text in them is escaped already.
    environment.filters["markup"] = Markup
    template = environment.get_template(TEMPLATE)
    return template.render(page=page, style=style, script=script, policy=policy(style=style, script=script))


def policy(*, style: str, script: str) -> str:
    """What the page is allowed: this style sheet and this script, and nothing from any address."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}"


def _shown(value: object) -> object:
    """What a template prints of a value: hidden characters of a plain text are spelt out before it is escaped."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
