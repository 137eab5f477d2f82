import pytest

from qlora_trainer.pages.visible import LONGEST, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred\x1b]8;;http://x\x07", "a\\x1b[31mred\\x1b]8;;http://x\\x07"),
        ("nul\x00", "nul\\x00"),
        ("admin\u202e\u2066// end\u2069", "admin\\u202e\\u2066// end\\u2069"),
        ("\u200e\u200f\u061c\ufeff\u200b", "\\u200e\\u200f\\u061c\\ufeff\\u200b"),
        ("half \ud83d pair", "half \\ud83d pair"),
        ("tag \U000e0041", "tag \\U000e0041"),
        ("\x85\x9b", "\\x85\\x9b"),
        ("one\r\ntwo\rthree", "one\ntwo\\rthree"),
    ],
)
def test_what_a_reader_cannot_see_is_spelt_out(text: str, shown: str) -> None:
    assert visible(text) == shown


# Hebrew, Arabic, Japanese; a joined emoji; Persian with its joiner.
@pytest.mark.parametrize(
    "text", ["", "tab\tand\nline", "\u05e9\u05dc \u0639\u0631 \u65e5\u672c ü", "👩\u200d🚀", "\u0645\u06cc\u200c\u062e"]
)
def test_what_languages_are_written_in_stays(text: str) -> None:
    assert visible(text) == text


def test_a_huge_text_is_cut_and_says_by_how_much() -> None:
    shown = visible("x" * (LONGEST + 1234))
    assert shown == f"{'x' * LONGEST} […1,234 more characters are not shown here]"
