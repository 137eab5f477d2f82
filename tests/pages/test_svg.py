from xml.etree.ElementTree import fromstring, tostring

from qlora_trainer.pages.svg import canvas, draw_cell, draw_dot, draw_line, draw_point, draw_text, read_mark_by_mark


def test_a_drawing_is_valid_xml_and_text_in_it_stays_text() -> None:
    svg = canvas((200, 100), title='a "title" <b>')
    draw_text(svg, (10, 20), text="<i>&amp;", css="name", anchor="end")
    draw_dot(svg, (1.26, 2), css="dot", tip="<tip>")
    root = fromstring(tostring(svg))
    assert root.get("aria-label") == 'a "title" <b>'
    assert [text.text for text in root.iter("text")] == ["<i>&amp;"]
    assert [tip.text for tip in root.iter("title")] == ["<tip>"]
    assert {element.tag for element in root.iter()} == {"svg", "text", "circle", "title"}


def test_a_line_goes_through_its_points_and_no_points_draw_nothing() -> None:
    svg = canvas((200, 100), title="line")
    draw_line(svg, [], css="curve")
    draw_line(svg, [(0, 1), (2.04, 3.06)], css="curve")
    assert [line.get("points") for line in svg] == ["0.0,1.0 2.0,3.1"]


def test_a_point_has_a_shape_of_its_own_and_says_what_it_is() -> None:
    svg = canvas((200, 100), title="points")
    draw_point(svg, (10, 20), corners=0, radius=4.5, css="point", tip="<round>")
    draw_point(svg, (10, 20), corners=4, radius=5, css="point", tip="square")
    circle, square = svg
    assert (circle.tag, circle.get("aria-label"), circle.findtext("title")) == ("circle", "<round>", "<round>")
    assert square.get("points") == "10.0,15.0 15.0,20.0 10.0,25.0 5.0,20.0"


def test_a_drawing_that_is_read_mark_by_mark_is_a_group_of_named_marks() -> None:
    svg = canvas((200, 100), title="map")
    read_mark_by_mark(svg, by="place")
    draw_cell(svg, (0, 0), size=(10, 10), strength=7, tip="first", inside="7", css="outlined")
    assert (svg.get("role"), svg.get("data-cells")) == ("group", "place")
    cell, text = svg
    assert (cell.get("class"), cell.get("role"), cell.get("aria-label")) == ("heat h7 outlined", "img", "first")
    assert text.get("class") == "inside strong"
