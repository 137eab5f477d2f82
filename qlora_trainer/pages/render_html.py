"""A page as one HTML file that needs no network and no font; every text is made visible and escaped.

What the page may do is bound by its own Content-Security-Policy: nothing is loaded from anywhere, and only the one
style sheet and the one script that are named by their hashes count. Markup that slipped through the escaping could
still not run.
"""

import base64
import hashlib
import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from qlora_trainer.pages.page import Page
from qlora_trainer.pages.visible import visible

FOLDER = Path(__file__).parent / "templates"
TEMPLATE = "page.html.j2"
BEFORE_UNIT = re.compile(r"(?<=\d) (?=(?:%|[KMG]?i?B|ms|s|min|h|nats|bits)(?!\w))")


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
    environment.filters["together"] = together
    environment.filters["breakable"] = breakable
    template = environment.get_template(TEMPLATE)
    return template.render(page=page, style=style, script=script, policy=policy(style=style, script=script))


def together(text: str) -> str:
    r"""A number and its unit with a space between them at which no line is broken; for words of our own.

    >>> together("98 % of 4.0 GiB")
    '98\xa0% of 4.0\xa0GiB'
    """
    return BEFORE_UNIT.sub("\u00a0", text)


def breakable(name: str) -> Markup:
    """A name whose line may be broken behind its underscores, and not first in the middle of a word."""
    return Markup("_<wbr>").join(escape(part) for part in visible(name).split("_"))


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
