from xml.etree.ElementTree import fromstring, tostring

from qlora_trainer.pages.svg import canvas, draw_dot, draw_line, draw_text


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
