import pytest

from qlora_trainer.pages.compared import LARGEST, Part, compare_answers, differing


def rebuilt(parts: tuple[Part, ...], *hows: str) -> str:
    return "".join(part.text for part in parts if part.how in hows)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ('{"to": "Ana", "amount": 40}', '{"to": "Bo", "amount": 40, "from": "x"}'),
        ("", "something"),
        ("a  b\nc", "a b c"),
        ("שלום, world!", "shalom, world?"),
    ],
)
def test_both_texts_can_be_read_off_the_parts(text: str, other: str) -> None:
    parts = differing(text, other)
    assert rebuilt(parts, "same", "added") == text
    assert rebuilt(parts, "same", "missing") == other


def test_only_the_words_that_differ_are_marked() -> None:
    parts = differing('{"count": null}', '{"count": 11}')
    assert parts == (Part('{"count": ', "same"), Part("11", "missing"), Part("null", "added"), Part("}", "same"))


def test_blank_space_around_an_answer_makes_no_difference() -> None:
    assert compare_answers("file", " yes\n", other="yes", against="trained").is_equal
    assert not compare_answers("file", "Yes", other="yes", against="trained").is_equal


def test_an_answer_that_is_compared_with_nothing_is_not_equal_to_it() -> None:
    alone = compare_answers("base", "yes", other=None, against="x")
    assert (alone.against, alone.is_equal, alone.parts) == ("", False, (Part("yes", "same"),))


def test_a_huge_answer_is_marked_whole_instead_of_searched() -> None:
    text = "word " * LARGEST
    assert differing(text, "other") == (Part(text, "added"),)
