"""report.html: one file that needs no network, no script and no font; every text is escaped by the template engine."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qlora_trainer.stages.report.page import Page

TEMPLATE = "report.html.j2"


def render_html(page: Page, *, stages_svg: str, training_svg: str, survived_svg: str = "") -> str:
    """The whole page as HTML.

    Args:
        page: what to show.
        stages_svg: the plot of every stage's loss, an ``svg`` element of ``plot``; it stands unescaped.
        training_svg: the plot of the training curve, or nothing; it stands unescaped.
        survived_svg: the map of ``heatmap``, or nothing; it stands unescaped.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # The plots are markup of our own, built as an element tree: every text in them is escaped already.
    plots = {"stages_svg": Markup(stages_svg), "training_svg": Markup(training_svg)}
    plots["survived_svg"] = Markup(survived_svg)
    return environment.get_template(TEMPLATE).render(page=page, **plots)
