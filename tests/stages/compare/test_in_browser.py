"""The page as a reader's browser shows it: nothing is refused, everything is drawn, keys and narrow screens work."""

from dataclasses import replace
from pathlib import Path

import pytest

from qlora_trainer.stages.compare import write
from tests.browser import CONTRAST, HOSTILE, IN_BROWSER, Browser
from tests.stages.compare.compared import COMPARISON

pytestmark = IN_BROWSER
FRONT = "document.querySelector('#methods svg[data-cells]')"
READOUT = "document.querySelector('#methods .readout').textContent"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write(COMPARISON, folder)
    return folder / "compare.html"


def test_both_charts_are_drawn_and_neither_is_empty(browser: Browser, page: Path) -> None:
    browser.open(page)
    sizes = browser.value(
        "[...document.querySelectorAll('figure svg[role]')].map(svg => [svg.getBoundingClientRect().width, "
        "svg.getBoundingClientRect().height, svg.querySelectorAll('rect, circle, polygon, polyline').length])"
    )
    assert len(sizes) == 2
    (front_width, front_height, front_marks), (map_width, _, cells) = sizes
    assert front_width > 800
    assert front_height > 300
    assert front_marks > 20
    assert map_width > 800
    assert cells == 2


def test_the_recommendation_and_its_reason_are_seen_without_scrolling(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280, height=800)
    assert browser.value("document.querySelector('.serve').getBoundingClientRect().bottom") < 800
    browser.open(page, width=400, height=844)
    assert browser.value("document.querySelector('.serve .facts').getBoundingClientRect().bottom") < 844


@pytest.mark.parametrize("width", [360, 400, 768, 1280])
def test_only_tables_and_charts_scroll_sideways(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    wide = "[...document.querySelectorAll('main *')].filter(each => !each.closest('.scroll, pre') && "
    assert browser.value(f"{wide} each.getBoundingClientRect().right > {width}).map(each => each.outerHTML)") == []


def test_on_a_narrow_screen_a_method_stays_in_sight_while_its_figures_are_scrolled(
    browser: Browser, page: Path
) -> None:
    browser.open(page, width=400)
    table = "document.querySelector('.methods').closest('.scroll')"
    name = "document.querySelector('.methods .marked th').getBoundingClientRect()"
    last = "document.querySelector('.methods .marked td:last-child').getBoundingClientRect()"
    before = browser.value(f"{name}.left")
    browser.value(f"{table}.scrollLeft = 10000")
    assert browser.value(f"{name}.left") == pytest.approx(before, abs=1)
    # The last figure is on the screen, and not beneath the name.
    assert browser.value(f"{last}.right") <= 400
    assert browser.value(f"{last}.left") >= browser.value(f"{name}.right") - 1


def test_no_figure_of_the_whole_table_is_cut_off_on_a_wide_screen(browser: Browser, page: Path) -> None:
    browser.open(page, width=1280)
    assert (
        browser.value("(each => each.scrollWidth - each.clientWidth)(document.querySelector('#methods .scroll'))") == 0
    )
    table = "document.querySelector('.methods').closest('.scroll')"
    assert browser.value(f"{table}.scrollWidth - {table}.clientWidth") == 0


@pytest.mark.parametrize("dark", [False, True])
def test_every_text_stands_out_from_its_ground(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    contrast = browser.value(CONTRAST)
    # The largest there is, black on white, is 21.
    assert 4.5 <= contrast <= 21


def test_the_recommended_row_has_a_ground_of_its_own(browser: Browser, page: Path) -> None:
    browser.open(page)
    ground = "(row => getComputedStyle(row.querySelector('td')).backgroundColor)"
    rows = browser.value(f"[...document.querySelectorAll('.methods tbody tr')].map({ground})")
    assert rows.count(rows[1]) == 1
    assert len(set(rows)) == 2


def test_the_front_is_read_mark_by_mark_from_left_to_right_with_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value(f"{FRONT}.focus()")
    told = []
    for _ in range(7):
        browser.press("ArrowRight")
        told.append(browser.value(READOUT).partition(":")[0])
    # Among equal sizes from the top; at the last one it stays.
    assert told == ["nf4", "rtn_int4", "gptq_int4", "smoothquant_w8a8", "rtn_int8", "16bit", "16bit"]
    browser.press("ArrowLeft")
    assert browser.value(READOUT) == "rtn_int8: 5.00 MiB, +0.0004 nats (+0.0004 to +0.0004), on the front"
    assert browser.value(f"{FRONT}.querySelectorAll('.chosen').length") == 1


def test_the_outliers_are_read_cell_by_cell_with_the_keyboard(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value("document.querySelector('#outliers svg[data-cells]').focus()")
    told = "document.querySelector('#outliers .readout').textContent"
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert browser.value(told) == "model.layers.1.mlp.down_proj: largest input 3.00; outlier dimensions: none"


def test_names_stand_within_the_chart_and_apart(browser: Browser, page: Path) -> None:
    browser.open(page)
    boxes = browser.value(
        f"[...{FRONT}.querySelectorAll('.name')].map(each => each.getBoundingClientRect())"
        ".map(box => [box.left, box.top, box.right, box.bottom])"
    )
    left, right = browser.value(f"(box => [box.left, box.right])({FRONT}.getBoundingClientRect())")
    assert len(boxes) == 6
    assert all(left <= box[0] and box[2] <= right for box in boxes)
    for number, first in enumerate(boxes):
        for second in boxes[number + 1 :]:
            is_apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
            assert is_apart, (first, second)


def test_everything_that_does_something_is_reached_by_tab_and_has_a_name(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.press("Tab")
    assert browser.value("document.activeElement.className") == "theme"
    nameless = (
        "[...document.querySelectorAll('button, a, summary, [tabindex]')].filter(each => "
        "!(each.textContent.trim() || each.getAttribute('aria-label'))).length"
    )
    assert browser.value(nameless) == 0


def test_a_printed_page_shows_what_is_folded_and_fits_its_table(browser: Browser, page: Path) -> None:
    # A4 less its margins is 718 px wide.
    browser.open(page, width=718)
    browser.value("dispatchEvent(new Event('beforeprint'))")
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.value("[...document.querySelectorAll('details')].every(each => each.open)")
    assert browser.value("document.querySelector('.methods').getBoundingClientRect().right") <= 718
    assert browser.value("document.querySelector('#methods svg').getBoundingClientRect().right") <= 718


def test_hostile_text_runs_nothing_and_asks_for_nothing(browser: Browser, tmp_path: Path) -> None:
    rows = tuple(
        replace(row, note=HOSTILE, what=HOSTILE, layers_16bit=(HOSTILE,), failed=HOSTILE if row.failed else None)
        for row in COMPARISON.rows
    )
    layers = tuple(replace(layer, layer=f"{HOSTILE}.0.{HOSTILE}") for layer in COMPARISON.outliers)
    odd = replace(COMPARISON, recipe=HOSTILE, rows=rows, outliers=layers, settings={HOSTILE: [HOSTILE]})
    odd = replace(odd, environment={HOSTILE: HOSTILE}, command=HOSTILE, recipe_text=HOSTILE)
    write(odd, tmp_path)
    browser.open(tmp_path / "compare.html")
    assert browser.value("document.title").endswith("\\u202e\\x00\\x1b[31m: gptq_int4 recommended")
    assert browser.value("document.querySelectorAll('img').length") == 0
    assert browser.value("document.querySelectorAll('script').length") == 1


def test_without_its_script_the_page_still_shows_both_charts(browser: Browser, page: Path, tmp_path: Path) -> None:
    start, _, rest = page.read_text("utf-8").partition("<script>")
    (tmp_path / "plain.html").write_text(start + rest.partition("</script>")[2], encoding="utf-8")
    browser.open(tmp_path / "plain.html")
    assert browser.value("document.querySelectorAll('figure svg[role]').length") == 2
    assert browser.value("document.querySelectorAll('button').length") == 0
