"""What pydantic found wrong -> sentences with the value, the place and the mend."""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic_core import ErrorDetails

from qlora_trainer.recipe_file.document import DECIMAL, INTEGER, Document, Path, Place, Problem, dotted
from qlora_trainer.recipe_file.fields import choices, known_keys, plain, sections, setting

_EXPONENT = re.compile(r"([-+]?[0-9]+)(\.[0-9]*)?[eE]([-+]?)([0-9]+)")
_BASE_SIXTY = re.compile(r"[0-9]+(?::[0-5]?[0-9])+")
_BOOLEAN_WORDS = {
    "yes": True,
    "on": True,
    "y": True,
    "true": True,
    "no": False,
    "off": False,
    "n": False,
    "false": False,
}
_PATTERNS = {
    r"^[A-Za-z0-9][A-Za-z0-9_.-]*$": "may hold letters, digits, '_', '.' and '-', and begins with a letter or a digit",
    r"^\d{4}-\d{2}-\d{2}$": "must be a date such as 2026-01-15",
}


def schema_problems(errors: Sequence[ErrorDetails], document: Document) -> list[Problem]:
    """One problem for each setting that the recipe's types refuse and YAML's rules have not refused already."""
    refused = {problem.path for problem in document.problems}
    found: dict[Path, Problem] = {}
    for error in errors:
        path = _path(error, document)
        if path not in found and path not in refused and not _is_other_branch(error, path):
            found[path] = Problem(_place(path, document), path, _sentence(error, path))
    return list(found.values())


def closest(word: str, words: Sequence[str]) -> str | None:
    """The known word that a mistyped one most likely stands for."""
    by_lower = {known.lower(): known for known in words}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return by_lower[near[0]] if near else None


def shown(value: object) -> str:
    """A value as a message quotes it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value if len(value) <= 60 else value[:57] + '...'!r}"
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, Sequence) else repr(value)


def _path(error: ErrorDetails, document: Document) -> Path:
    """The error's path through the document: pydantic's names for the branches of a union are left out."""
    path: Path = ()
    for part in error["loc"]:
        if (*path, part) in document.places:
            path = (*path, part)
    return (*path, error["loc"][-1]) if error["type"] == "missing" else path


def _place(path: Path, document: Document) -> Place:
    """Where the setting stands, or the section or file that should hold it."""
    while path not in document.places:
        path = path[:-1]
    return document.places[path]


def _is_other_branch(error: ErrorDetails, path: Path) -> bool:
    """Whether the error tells of the branch of a union that the value was not meant for.

    Where a word or a text, a mapping, or a list can stand, a list is judged as a list, a mapping as a mapping and
    anything else as the word or the text. Where a word or a number can stand, text without a digit is judged as the
    word and anything else as the number.
    """
    if len(error["loc"]) == len(path) or error["type"] == "missing":
        return False
    if _may_be_number(path):
        is_word = isinstance(error["input"], str) and not any(sign.isdigit() for sign in error["input"])
        return is_word == (error["type"] != "literal_error")
    if error["type"] in ("literal_error", "string_type"):
        return isinstance(error["input"], list | dict) and error["loc"][-1] not in path
    # A list whose elements are wrong is told as too short as well.
    return error["type"] in ("tuple_type", "model_type") or (error["type"] == "too_short" and bool(error["input"]))


def _may_be_number(path: Path) -> bool:
    """Whether a number can stand for the word ``auto`` here."""
    info = setting(path)
    return info is not None and "auto" in choices(info.annotation) and "int" in str(info.annotation)


def _sentence(error: ErrorDetails, path: Path) -> str:
    word = _WORDINGS.get(error["type"])
    if word is not None:
        return word(error, path)
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {shown(error['input'])}"


def _context(error: ErrorDetails) -> dict[str, Any]:
    return error.get("ctx", {})


def _missing(error: ErrorDetails, path: Path) -> str:
    if len(path) == 1:
        section = sections()[str(path[0])]
        needed = [name for name, info in section.model_fields.items() if info.is_required()]
        keys = f", with {', '.join(needed)}" if needed else ""
        return f"this section is missing{keys}. {plain(section.__doc__)}"
    info = setting(path)
    return f"is missing. {plain(info.description)}" if info is not None else "is missing"


def _unknown(error: ErrorDetails, path: Path) -> str:
    key, parent = str(path[-1]), path[:-1]
    known = known_keys(parent)
    near = closest(key, known)
    if near is not None:
        return f"unknown key. Did you mean {near!r}?"
    homes = [name for name, section in sections().items() if key in section.model_fields and (name,) != parent]
    if homes:
        return f"unknown key here; {key!r} belongs to {' or '.join(f'{home}:' for home in homes)}"
    return f"unknown key. {dotted(parent) or 'A recipe'} has {', '.join(known)}"


def _not_a_choice(error: ErrorDetails, path: Path) -> str:
    info = setting(path)
    words = choices(info.annotation) if info is not None else ()
    takes_list = info is not None and "tuple[" in str(info.annotation)
    other = " or a whole number" if _may_be_number(path) else " or a list of names" if takes_list else ""
    also_list = other if len(error["loc"]) > len(path) else ""
    value = error["input"]
    # What YAML 1.1 makes of `off` and `no`; a recipe written by another tool may hold it.
    typed = {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)
    near = closest(typed, words)
    mend = f". Did you mean {near!r}?" if near is not None else ""
    one_of = "one of " if len(words) > 1 else ""
    return f"must be {one_of}{', '.join(words)}{also_list}, got {shown(value)}{mend}"


def _not_whole(error: ErrorDetails, path: Path) -> str:
    value = error["input"]
    if isinstance(value, float) and value.is_integer():
        return f"must be a whole number, got {value}. Write {int(value)}"
    return f"must be a whole number, got {shown(value)}{_number_hint(value, whole=True)}"


def _not_a_number(error: ErrorDetails, path: Path) -> str:
    return f"must be a number, got {shown(error['input'])}{_number_hint(error['input'], whole=False)}"


def _number_hint(value: object, *, whole: bool) -> str:
    """Why a number was read as text, and how to write it, as far as the text tells."""
    if not isinstance(value, str):
        return ""
    exponent = _EXPONENT.fullmatch(value)
    if exponent is not None:
        mantissa, fraction, sign, power = exponent.groups()
        number = float(value)
        is_short_integer = whole and abs(number) < 1e15 and number.is_integer()
        mend = str(int(number)) if is_short_integer else f"{mantissa}{fraction or '.0'}e{sign or '+'}{power}"
        return f". YAML reads {value} as text: write {mend}"
    if INTEGER.fullmatch(value) or DECIMAL.fullmatch(value):
        return ". Remove the quotation marks"
    if _BASE_SIXTY.fullmatch(value):
        return f". Some YAML readers take {value} for a number of base 60. Write the number itself"
    return _spelling_hint(value)


def _spelling_hint(value: str) -> str:
    """The mend where another language's spelling of a number was used."""
    if value.lower().lstrip("+-.") in {"inf", "nan"}:
        return ". Only finite numbers are allowed"
    if value.lstrip("+-").isdecimal():
        return ". It is too large"
    for read in (lambda text: int(text, 0), float):
        try:
            return f". YAML readers disagree about {value}: write {read(value)}"
        except ValueError:
            continue
    return ""


def _not_a_boolean(error: ErrorDetails, path: Path) -> str:
    value = error["input"]
    meant = _BOOLEAN_WORDS.get(value.lower()) if isinstance(value, str) else None
    mend = "" if meant is None else f". Write {str(meant).lower()}"
    return f"must be true or false, got {shown(value)}{mend}"


def _not_text(error: ErrorDetails, path: Path) -> str:
    value = error["input"]
    if isinstance(value, bool | int | float):
        return f'must be text, got {shown(value)}. Put it in quotes: "{str(value).lower()}"'
    if isinstance(value, Mapping | list):
        return f"must be text, got {shown(value)}. Put text that begins with {{ or [ in quotes"
    return f"must be text, got {shown(value)}"


def _not_a_list(error: ErrorDetails, path: Path) -> str:
    value = error["input"]
    mend = f". Write [{value}]" if isinstance(value, str) else ""
    return f"must be a list, got {shown(value)}{mend}"


def _not_a_section(error: ErrorDetails, path: Path) -> str:
    if error["input"] is None:
        return f"is empty. Write its settings below it, or remove the line {dotted(path)}:"
    return f"must hold settings (key: value), got {shown(error['input'])}. It has {', '.join(known_keys(path))}"


def _out_of_range(error: ErrorDetails, path: Path) -> str:
    words = {"gt": "greater than", "ge": "at least", "lt": "less than", "le": "at most"}
    bound = next(f"{words[key]} {value:g}" for key, value in _context(error).items() if key in words)
    return f"must be {bound}, got {shown(error['input'])}"


def _wrong_pattern(error: ErrorDetails, path: Path) -> str:
    pattern = str(_context(error)["pattern"])
    return f"{_PATTERNS.get(pattern, f'must match the pattern {pattern}')}; got {shown(error['input'])}"


def _refused(error: ErrorDetails, path: Path) -> str:
    return str(_context(error)["error"])


_WORDINGS: Mapping[str, Callable[[ErrorDetails, Path], str]] = {
    "missing": _missing,
    "extra_forbidden": _unknown,
    "literal_error": _not_a_choice,
    "int_type": _not_whole,
    "float_type": _not_a_number,
    "bool_type": _not_a_boolean,
    "string_type": _not_text,
    "tuple_type": _not_a_list,
    "dict_type": lambda error, path: f"must be a mapping of names to values, got {shown(error['input'])}",
    "model_type": _not_a_section,
    "greater_than": _out_of_range,
    "greater_than_equal": _out_of_range,
    "less_than": _out_of_range,
    "less_than_equal": _out_of_range,
    "string_pattern_mismatch": _wrong_pattern,
    "too_short": lambda error, path: "must not be an empty list",
    "value_error": _refused,
}
