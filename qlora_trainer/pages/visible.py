"""Text from outside, made safe to look at: what a reader cannot see, or what would turn other text round, is spelt out.

Data and model output can hold terminal escapes, NULs, characters that turn the writing direction (so that a text
reads otherwise than it is: CVE-2021-42574), invisible ones, and megabytes. Escaping for HTML or Markdown comes after.
"""

import re

LONGEST = 100_000
"""Characters of one text that are shown."""

# Controls but tab and line feed; half surrogate pairs; direction marks; zero-width and other invisible characters.
# The joiners U+200C and U+200D stay: Persian and many emoji are spelt with them.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""The text with every hidden character spelt out and, where it is very long, cut with a word on how much.

    >>> visible("a\x1b[31m\u202eb\x00\n")
    'a\\x1b[31m\\u202eb\\x00\n'
    """
    shown = HIDDEN.sub(_spelt, text[:LONGEST].replace("\r\n", "\n"))
    rest = len(text) - LONGEST
    return shown if rest <= 0 else f"{shown} […{rest:,} more characters are not shown here]"


def writable(text: str) -> str:
    """The text with half surrogate pairs spelt out; JSON rows can hold them, UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _spelt(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape", "surrogatepass").decode("ascii")
