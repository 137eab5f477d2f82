"""Makes the items of the package's own probes: the same bytes every time.

    python -m scripts.make_probes

Every item is generated here from short lists, so that nothing is downloaded, nothing has a licence of its own, and no
model has seen the items. What the probes can show is told in qlora_trainer/stages/tasks/probes/README.md.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "qlora_trainer/stages/tasks/probes"
ITEMS = 48
SEED = 20261125

NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Grace", "Henry", "Ida", "Jonas")
PLACES = ("Rome", "Oslo", "Paris", "Lima", "Cairo", "Delhi", "Tokyo", "Boston", "Berlin", "Madrid")
WORDS = (
    "river",
    "table",
    "garden",
    "window",
    "paper",
    "silver",
    "market",
    "winter",
    "bridge",
    "yellow",
    "forest",
    "candle",
)
THINGS = ("apples", "books", "coins", "pens", "stamps", "shells")
RULES = {
    "capitals": str.upper,
    "reversed": lambda word: word[::-1],
    "doubled": lambda word: f"{word} {word}",
    "first letter": lambda word: word[0],
}

Item = dict[str, object]


def in_context(rng: random.Random) -> Iterator[Item]:
    """A rule shown on four words, to be applied to a fifth; the choices are what the four rules give of it."""
    for index in range(ITEMS):
        rule = tuple(RULES)[index % len(RULES)]
        *shown, asked = rng.sample(WORDS, 5)
        lines = [f"{word} -> {RULES[rule](word)}" for word in shown]
        choices = [make(asked) for make in RULES.values()]
        rng.shuffle(choices)
        yield {
            "prompt": "\n".join([*lines, f"{asked} ->"]),
            "choices": choices,
            "answer": choices.index(RULES[rule](asked)),
        }


def repeated_facts(rng: random.Random) -> Iterator[Item]:
    """Where somebody lives, told once among the homes of five others."""
    for _ in range(ITEMS):
        people, homes = rng.sample(NAMES, 6), rng.sample(PLACES, 6)
        asked = rng.randrange(6)
        facts = " ".join(f"{name} lives in {home}." for name, home in zip(people, homes, strict=True))
        choices = [homes[asked], *rng.sample([home for home in homes if home != homes[asked]], 3)]
        rng.shuffle(choices)
        yield {
            "prompt": f"{facts} As was said, {people[asked]} lives in",
            "choices": choices,
            "answer": choices.index(homes[asked]),
        }


def chain_of_thought(rng: random.Random) -> Iterator[Item]:
    """Two steps of arithmetic, to be written out as in the worked example of the task file."""
    for _ in range(ITEMS):
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        start, given, bought = rng.randint(10, 40), rng.randint(1, 9), rng.randint(2, 20)
        yield {
            "question": f"{name} has {start} {thing}, gives away {given} and then buys {bought}. "
            f"How many {thing} does {name} have?",
            "answer": str(start - given + bought),
        }


def instructions(rng: random.Random) -> Iterator[Item]:
    """Orders with one right answer, so that following them can be checked letter by letter; none twice."""
    asked: set[str] = set()
    while len(asked) < ITEMS:
        order, answer = _orders(rng)[len(asked) % 4]
        if order not in asked:
            asked.add(order)
            yield {"instruction": f"{order} Write nothing else.", "answer": answer}


def _orders(rng: random.Random) -> tuple[tuple[str, str], ...]:
    """Four kinds of orders on words drawn anew, each with its right answer."""
    first, second, third = rng.sample(WORDS, 3)
    number = rng.randint(2, 4)
    in_order = ", ".join(sorted((first, second, third)))
    return (
        (f"Write the word {first} in capital letters.", first.upper()),
        (f"Write the word {first} {number} times, with one space between.", " ".join([first] * number)),
        (f"Write the words {first}, {second}, {third} in alphabetical order.", in_order),
        (f"Write the last of these words: {first}, {second}, {third}.", third),
    )


PROBES = {
    "in_context": in_context,
    "repeated_facts": repeated_facts,
    "chain_of_thought": chain_of_thought,
    "instructions": instructions,
}


def items_of(name: str) -> str:
    """The items of one probe as JSON lines."""
    return "".join(json.dumps(item) + "\n" for item in PROBES[name](random.Random(f"{SEED} {name}")))


def main() -> None:
    """Writes every file of items."""
    for name in PROBES:
        (FOLDER / f"{name}.jsonl").write_text(items_of(name), encoding="utf-8")
        print(FOLDER / f"{name}.jsonl")


if __name__ == "__main__":
    main()
