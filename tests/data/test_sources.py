from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from qlora_trainer.data.problems import listed_problems
from qlora_trainer.data.sources import Reading, Row, read_rows
from qlora_trainer.errors import DataError


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path)
    return str(caught.value)


def test_json_lines_are_read_with_their_line_numbers_and_blank_lines_are_counted(tmp_path: Path) -> None:
    file = read_rows(written(tmp_path / "a.jsonl", '{"a": 1}\n\n  \r\n{"a": "x", "b": [2]}\r\n'))
    assert file.rows == (Row(1, {"a": 1}), Row(4, {"a": "x", "b": [2]}))
    assert file.blank_lines == 2


def test_line_separators_inside_json_texts_are_no_line_ends(tmp_path: Path) -> None:
    file = read_rows(written(tmp_path / "a.jsonl", '{"a": "one\u2028two\x85three"}'))
    assert file.rows == (Row(1, {"a": "one\u2028two\x85three"}),)


def test_csv_rows_are_read_with_the_line_on_which_they_begin(tmp_path: Path) -> None:
    content = 'mr,ref\n"a, b","says ""hi""\nand goes"\n\nc,d\n'
    file = read_rows(written(tmp_path / "a.csv", content))
    assert file.rows == (Row(2, {"mr": "a, b", "ref": 'says "hi"\nand goes'}), Row(5, {"mr": "c", "ref": "d"}))
    assert file.blank_lines == 1


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", '{"ä": "ö"}'), ("a.csv", "ä\r\nö\r\n")])
def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path, name: str, content: str) -> None:
    marked = read_rows(written(tmp_path / name, b"\xef\xbb\xbf" + content.encode()))
    assert [row.columns for row in marked.rows] == [{"ä": "ö"}]


def test_every_bad_json_line_is_told(tmp_path: Path) -> None:
    content = '{"a": 1}\n{"a": }\n[1]\n{"a": 2}\n{"a"\n'
    text = refusal(written(tmp_path / "a.jsonl", content))
    assert "3 problems" in text
    assert "line 2: is no JSON (Expecting value at column 7)" in text
    assert "line 3: a list, not an object" in text
    assert "line 5: is no JSON (Expecting ':' delimiter" in text
    assert "line 1:" not in text


def test_the_first_ten_problems_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    lines = refusal(written(tmp_path / "a.jsonl", "nonsense\n" * 25)).splitlines()
    assert lines[0].endswith("a.jsonl: 25 problems")
    assert [line.split(":")[0].strip() for line in lines[1:11]] == [f"line {number}" for number in range(1, 11)]
    assert lines[11:] == ["  and 15 more"]


def test_one_problem_is_told_in_the_singular() -> None:
    assert listed_problems("file", ["bad"]) == "file: 1 problem\n  bad"


def test_a_json_array_is_recognized(tmp_path: Path) -> None:
    assert "Write one object per line, or name the file .json" in refusal(
        written(tmp_path / "a.jsonl", '[\n  {"a": 1},\n  {"a": 2}\n]\n')
    )


def test_csv_rows_of_the_wrong_width_are_told(tmp_path: Path) -> None:
    text = refusal(written(tmp_path / "a.csv", 'a,b\n1,2\n"x\ny"\n1,2,3\n'))
    assert "line 3: 1 fields where the header has 2" in text
    assert "line 5: 3 fields where the header has 2" in text


def test_a_quote_that_is_never_closed_is_told_instead_of_swallowing_the_file(tmp_path: Path) -> None:
    text = refusal(written(tmp_path / "a.csv", 'a,b\n1,2\n1,"open\n3,4\n5,6\n'))
    assert "line 3: unexpected end of data" in text


def test_a_column_that_is_named_twice_is_told(tmp_path: Path) -> None:
    assert "line 1: the header names 'a' twice" in refusal(written(tmp_path / "a.csv", "a,b,a\n1,2,3\n"))


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", ""), ("a.jsonl", "\n \n"), ("a.csv", ""), ("a.csv", "a,b\n")]
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    assert "holds no row" in refusal(written(tmp_path / name, content))


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_the_byte_that_is_not_utf8_is_told(tmp_path: Path, mark: bytes) -> None:
    text = refusal(written(tmp_path / "a.csv", mark + "a\nö\n".encode() + "ü\n".encode("latin-1")))
    assert f"line 3: byte {len(mark) + 5} is 0xfc, which is not UTF-8" in text


def test_a_folder_is_no_data_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").mkdir()
    assert "cannot be read (Is a directory)" in refusal(tmp_path / "a.jsonl")


def test_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    assert "ends with '.xlsx'; give a file that is one of .jsonl (one JSON object per line), .json" in refusal(
        tmp_path / "a.xlsx"
    )


def test_a_json_array_is_read_where_the_name_says_json(tmp_path: Path) -> None:
    file = read_rows(written(tmp_path / "a.json", '\n [\n{"a": 1},\n{"a": "x"}]\n'))
    assert [row.columns for row in file.rows] == [{"a": 1}, {"a": "x"}]


def test_a_json_file_may_hold_lines_as_hub_data_sets_do(tmp_path: Path) -> None:
    file = read_rows(written(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n'))
    assert file.rows == (Row(1, {"a": 1}), Row(2, {"a": 2}))


def test_a_broken_json_array_is_told_with_its_line(tmp_path: Path) -> None:
    assert "line 2: is no JSON (Expecting value at column 7)" in refusal(
        written(tmp_path / "a.json", '[{"a": 1},\n{"a": }]')
    )
    assert "element 2: a number, not an object" in refusal(written(tmp_path / "b.json", '[{"a": 1}, 2]'))


def parquet(path: Path, columns: dict[str, list[object]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_parquet_rows_are_numbered_and_their_lists_and_structs_are_python_values(tmp_path: Path) -> None:
    messages: list[object] = [
        [{"role": "user", "content": "Hi", "name": "Anna"}, {"role": "assistant", "content": "Yes", "name": None}],
        [{"role": "assistant", "content": "No", "name": None}],
    ]
    file = read_rows(parquet(tmp_path / "a.parquet", {"messages": messages, "note": [None, "x"]}))
    assert [row.line for row in file.rows] == [1, 2]
    # A field that is null is one that the struct does not have; a column that is null stays.
    assert file.rows[0].columns == {
        "messages": [{"role": "user", "content": "Hi", "name": "Anna"}, {"role": "assistant", "content": "Yes"}],
        "note": None,
    }
    assert file.rows[1].columns["messages"] == [{"role": "assistant", "content": "No"}]


def test_parquet_is_read_some_rows_at_a_time(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"a": list(range(3000))})
    assert [row.columns["a"] for row in Reading(path)] == list(range(3000))
    assert Reading(path).in_words(Row(7, {})) == "row 7"
    assert Reading(path).where(Row(7, {})) == f"{path}: row 7"


def test_a_file_that_is_no_parquet_is_told(tmp_path: Path) -> None:
    assert "is no readable Parquet file" in refusal(written(tmp_path / "a.parquet", "nonsense"))


def test_a_parquet_file_that_ends_early_is_told(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"a": [str(number) * 50 for number in range(5000)]})
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(2000) + content[2100:])
    with pytest.raises(DataError, match=r"a\.parquet: damaged behind row \d+"):
        read_rows(path)


def test_a_text_file_is_one_document_or_those_between_its_separators(tmp_path: Path) -> None:
    path = written(tmp_path / "a.txt", "one\n\ntwo\n<|end|>\n\n<|end|>\nthree\n")
    assert [row.columns for row in Reading(path)] == [{"text": "one\n\ntwo\n<|end|>\n\n<|end|>\nthree"}]
    parted = Reading(path, text_separator="<|end|>")
    assert list(parted) == [Row(1, {"text": "one\n\ntwo"}), Row(7, {"text": "three"})]
    assert parted.blank_lines == 1
    assert [row.columns["text"] for row in Reading(path, text_separator="")] == [
        "one",
        "two\n<|end|>",
        "<|end|>\nthree",
    ]


def test_a_file_may_be_read_twice(tmp_path: Path) -> None:
    reading = Reading(written(tmp_path / "a.jsonl", '{"a": 1}\n\n'))
    assert list(reading) == list(reading) == [Row(1, {"a": 1})]
    assert reading.blank_lines == 1
