"""Which task can a small model learn in minutes, and not do before? Makes one: a request in, a JSON call out.

    python scripts/make_task.py --out recipes/quickstart/data

The words are in ``make_task.toml``: intents, templates, slots. Names, towns, venues, things and amounts that a
test row asks for were never asked for in training, and a share of the test rows uses templates that training
never saw. Standard library only; the same seed gives the same bytes.
"""

import argparse
import json
import random
import re
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Said: TypeAlias = tuple[str, Json]
Row: TypeAlias = dict[str, str]

TABLES: Final = Path(__file__).with_suffix(".toml")

# The difficulty, all of it.
ROWS: Final = {"train": 6000, "validation": 500, "test": 500}
NEW_TEMPLATES: Final = {"train": 0.0, "validation": 0.5, "test": 0.5}
"""Share of a split's rows with a template of the split's own; the others use templates of training."""
NEW_VALUES: Final = {"train": 0.0, "validation": 0.5, "test": 1.0}
"""Share of a split's rows with words from the split's own part of the pools; the others use training's part."""
POOL_SHARES: Final = {"train": 0.7, "validation": 0.1, "test": 0.2}
"""How the words of all pools are divided."""
INTENTS: Final = 10
"""How many of the table's intents are used, from the top."""
NAMES: Final = 1500
"""People, and as many towns, before the division."""
AMOUNTS: Final = 500
"""Amounts are 2 to this, and every third of them with 25 or 75 cents."""
TIMES_IN_WORDS: Final = 0.4
"""Share of times such as "half past seven"; the others are digits, half of these with am or pm."""


@dataclass(frozen=True)
class Tables:
    """``make_task.toml`` as read; its first lines say what each table is."""

    wrappers: dict[str, list[str]]
    closed: dict[str, dict[str, Json]]
    shared: dict[str, list[str]]
    patterns: dict[str, str]
    pools: dict[str, str]
    intents: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Lexicon:
    """What one split may say: closed tables, words by pool, and patterns that put words together."""

    closed: dict[str, dict[str, Json]]
    words: dict[str, list[str]]
    patterns: dict[str, str]


def read_tables() -> Tables:
    """The table file beside this script."""
    return Tables(**tomllib.loads(TABLES.read_text(encoding="utf-8")))


def divided(words: set[str], *, seed: int) -> dict[str, set[str]]:
    """Words cut into disjoint parts, one for each split, in a seeded order."""
    order = sorted(words)
    random.Random(f"{seed}/words").shuffle(order)
    parts, start = {}, 0
    for split, share in POOL_SHARES.items():
        end = start + round(share * len(order))
        parts[split] = set(order[start:end])
        start = end
    return parts


def pools_of(table: dict[str, str], *, seed: int) -> dict[str, list[str]]:
    """Every pool as a list; names are put together from syllables, amounts are counted."""
    pools = {name: words.split() for name, words in table.items()}
    onsets, middles = pools.pop("onsets"), pools.pop("middles")
    for name, endings in (("names", pools.pop("person_endings")), ("towns", pools.pop("town_endings"))):
        every = sorted({onset + middle + ending for onset in onsets for middle in middles for ending in endings})
        pools[name] = random.Random(f"{seed}/{name}").sample(every, NAMES)
    cents = [f"{number}.{part}" for number in range(2, AMOUNTS, 3) for part in (25, 75)]
    pools["amounts"] = [str(number) for number in range(2, AMOUNTS)] + cents
    return pools


def lexicons(tables: Tables, *, seed: int) -> dict[str, Lexicon]:
    """One lexicon for each split: the same closed tables, shared words and patterns, but its own part of the pools.

    A word that is in two pools falls to one split in both.
    """
    pools = pools_of(tables.pools, seed=seed)
    parts = divided({word for pool in pools.values() for word in pool}, seed=seed)
    return {
        split: Lexicon(
            closed=tables.closed,
            words=tables.shared | {name: [w for w in pool if w in parts[split]] for name, pool in pools.items()},
            patterns=tables.patterns,
        )
        for split in ROWS
    }


def said_date(lexicon: Lexicon, chance: random.Random) -> Said:
    """A relative day, a weekday, or a day and month: ``tomorrow``, ``friday``, ``05-03``."""
    form = chance.choice(("relative", "weekday", "day month", "month day"))
    if form == "relative":
        return say("relative_day", lexicon, chance)
    if form == "weekday":
        name, value = say("weekday", lexicon, chance)
        return f"on {name}", value
    day, (month, number) = chance.randint(1, 28), say("month", lexicon, chance)
    return f"on {day} {month}" if form == "day month" else f"on {month} {day}", f"{number}-{day:02}"


def said_time(lexicon: Lexicon, chance: random.Random) -> Said:
    """A time of day as ``HH:MM``: in words, with am or pm, or in 24 hours."""
    if chance.random() < TIMES_IN_WORDS:
        (past, minute), (name, hour) = say("past_the_hour", lexicon, chance), say("number", lexicon, chance)
        return f"at {past}{name}", f"{hour:02}:{minute}"
    minute = chance.choice(("00", "15", "30", "45"))
    if chance.random() < 0.5:
        clock = f"{chance.randint(10, 23)}:{minute}"
        return f"at {clock}", clock
    hour, (half, shift) = chance.randint(1, 11), chance.choice((("am", 0), ("pm", 12)))
    return f"at {hour} {half}" if minute == "00" else f"at {hour}:{minute} {half}", f"{hour + shift:02}:{minute}"


def said_amount(lexicon: Lexicon, chance: random.Random) -> Said:
    """An amount with its currency, nested."""
    (said, currency), number = say("currency", lexicon, chance), chance.choice(lexicon.words["amounts"])
    return said.format(number), {"value": json.loads(number), "currency": currency}


def said_count(lexicon: Lexicon, chance: random.Random) -> Said:
    """Two to twelve, as a word or in digits."""
    name, number = chance.choice([pair for pair in lexicon.closed["number"].items() if pair[1] != 1])
    return chance.choice((name, str(number))), number


def said_exception(lexicon: Lexicon, chance: random.Random) -> Said:
    """One or two weekdays that are left out."""
    days = chance.sample(list(lexicon.closed["weekday"].items()), chance.choice((1, 1, 2)))
    return "on " + " or ".join(name for name, _ in days), [value for _, value in days]


def said_people(lexicon: Lexicon, chance: random.Random) -> Said:
    """One or two people, as a list."""
    names = chance.sample(lexicon.words["names"], chance.choice((1, 1, 2)))
    return " and ".join(names), list(names)


def said_items(lexicon: Lexicon, chance: random.Random) -> Said:
    """One or two goods, each with a count or, for "some", null."""
    words, items = [], []
    for name in chance.sample(lexicon.words["goods"], chance.choice((1, 1, 2))):
        count, number = said_count(lexicon, chance) if chance.random() < 0.7 else ("some", None)
        words.append(f"{count} {name}")
        items.append({"item": name, "count": number})
    return " and ".join(words), list(items)


SLOTS: Final[dict[str, Callable[[Lexicon, random.Random], Said]]] = {
    "date": said_date,
    "keep": said_date,
    "time": said_time,
    "amount": said_amount,
    "count": said_count,
    "except": said_exception,
    "with": said_people,
    "items": said_items,
}


def say(slot: str, lexicon: Lexicon, chance: random.Random) -> Said:
    """The words for a slot and what the call then holds."""
    if slot in SLOTS:
        return SLOTS[slot](lexicon, chance)
    if slot in lexicon.closed:
        return chance.choice(list(lexicon.closed[slot].items()))

    def word(match: re.Match[str]) -> str:
        found = chance.choice(lexicon.words[match[1].lower()])
        return found.capitalize() if match[1][0].isupper() else found

    text = re.sub(r"\{(\w+)\}", word, lexicon.patterns[slot])
    return text, text


def request_and_values(template: str, lexicon: Lexicon, chance: random.Random) -> tuple[str, dict[str, Json]]:
    """A template with its optional parts decided and its slots filled, and the value of each slot that it holds."""
    values: dict[str, Json] = {}

    def fill(match: re.Match[str]) -> str:
        said, values[match[1]] = say(match[1], lexicon, chance)
        return said

    decided = re.sub(r"\[(.*?)\]", lambda match: match[1] if chance.random() < 0.5 else "", template)
    return re.sub(r"\{(\w+)\}", fill, decided), values


def rows(split: str, tables: Tables, *, seed: int) -> Iterator[Row]:
    """Endless rows of one split; repeats are possible, contradictions ("cancel Friday, keep Friday") are not."""
    chance = random.Random(f"{seed}/{split}")
    lexicon_of = lexicons(tables, seed=seed)
    intents = list(tables.intents.items())[:INTENTS]
    while True:
        intent, table = chance.choice(intents)
        source = split if chance.random() < NEW_TEMPLATES[split] else "train"
        number, template = chance.choice(list(enumerate(table[source].strip().split("\n"), start=1)))
        lexicon = lexicon_of[split if chance.random() < NEW_VALUES[split] else "train"]
        request, values = request_and_values(template, lexicon, chance)
        if "keep" in values and values["keep"] == values["date"]:
            continue
        mood = "sentence" if template[-1] in ".?" else "imperative"
        if mood == "sentence":
            request = request[0].upper() + request[1:]
        call = {"intent": intent} | {field: values.get(field) for field in table["fields"].split()}
        yield {
            "prompt": chance.choice(tables.wrappers[mood]).format(request),
            "completion": json.dumps(call),
            "intent": intent,
            "template": f"{intent}/{source}/{number}",
        }


def make_task(*, seed: int) -> dict[str, list[Row]]:
    """All rows by split; no prompt stands twice, neither in a split nor in two."""
    tables = read_tables()
    task: dict[str, list[Row]] = {}
    seen: set[str] = set()
    for split, count in ROWS.items():
        task[split] = []
        stream = rows(split, tables, seed=seed)
        while len(task[split]) < count:
            row = next(stream)
            if row["prompt"] not in seen:
                seen.add(row["prompt"])
                task[split].append(row)
    return task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of train.jsonl, validation.jsonl and test.jsonl"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for split, task_rows in make_task(seed=args.seed).items():
        text = "".join(json.dumps(row) + "\n" for row in task_rows)
        (args.out / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        print(f"{split}: {len(task_rows)} rows, {len(text):,} bytes")


if __name__ == "__main__":
    main()
