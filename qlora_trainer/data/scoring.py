"""Task metrics of generated text, kept per row so that an interval over rows can be taken.

Every figure is a function of sums over rows. For all metrics but BLEU it is one sum over another
(``RowScores``); BLEU is a function of ten sums (``BleuRows``). rouge-score and sacrebleu come with the extra
``eval`` and are imported when they are used.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal

from qlora_trainer.data.problems import listed_problems
from qlora_trainer.errors import DataError, MissingPackageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

RatioMetric = Literal["exact_match", "slot_f1", "token_f1", "rouge_l"]
Ratio = tuple[float, float]

PACKAGES = {"rouge_l": ("rouge_score", "rouge-score"), "bleu": ("sacrebleu", "sacrebleu")}
"""Module and package that a metric needs."""

WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class RowScores:
    """A metric between 0 and 1: ``sum(numerators) / sum(denominators)``, one value of each per row."""

    numerators: tuple[float, ...]
    denominators: tuple[float, ...]

    @property
    def value(self) -> float:
        """The metric over all rows; 0 where the denominators sum to 0 (nothing was wanted, nothing given)."""
        total = sum(self.denominators)
        return sum(self.numerators) / total if total else 0.0


@dataclass(frozen=True)
class BleuRows:
    """What corpus BLEU needs of each row.

    Attributes:
        statistics: ten counts per row: output tokens, reference tokens, matching 1- to 4-grams, and 1- to
            4-grams of the output.
    """

    statistics: tuple[tuple[int, ...], ...]

    @property
    def value(self) -> float:
        """Corpus BLEU over all rows, 0 to 100."""
        return _corpus_bleu([sum(column) for column in zip(*self.statistics, strict=True)])

    @staticmethod
    def combine(sums: "Floats") -> "Floats":
        """Corpus BLEU (0 to 100) of each resample.

        Args:
            sums: float64, shape ``(resamples, 10)``: the statistics summed over the rows of each resample.

        Returns:
            float64, shape ``(resamples,)``.

        Raises:
            MissingPackageError: sacrebleu is not installed.
        """
        import numpy as np  # noqa: PLC0415 - takes 0.1 s, and `check` needs only the questions about packages

        return np.asarray([_corpus_bleu(row) for row in sums.tolist()], dtype=np.float64)


def missing_packages(metrics: Sequence[str]) -> list[str]:
    """Names of the packages that these metrics need and that are not installed."""
    needed = [PACKAGES[metric] for metric in metrics if metric in PACKAGES]
    return [package for module, package in needed if find_spec(module) is None]


def require_packages(metrics: Sequence[str]) -> None:
    """Refuses metrics whose packages are not installed.

    Raises:
        MissingPackageError: names the packages and the command.
    """
    missing = missing_packages(metrics)
    if missing:
        raise MissingPackageError(
            f"evaluation.metrics needs {' and '.join(missing)}, not installed here: "
            "pip install 'qlora-trainer[eval]'. Or remove the metric."
        )


def require_references(metrics: Sequence[str], references: Sequence[str], *, places: Sequence[str]) -> None:
    """Refuses references that a metric cannot read, before any model has run.

    Args:
        metrics: those that are asked for.
        references: wanted texts.
        places: where each reference stands, such as a file and a line.

    Raises:
        DataError: ``slot_f1`` is asked for, and some references are not JSON; names them.
    """
    if "slot_f1" not in metrics:
        return
    problems = [
        f"{place}: not JSON: {reference[:60]!r}"
        for place, reference in zip(places, references, strict=True)
        if _slots(reference) is None
    ]
    if problems:
        heading = "slot_f1 compares JSON; mend these completions, or remove slot_f1 from evaluation.metrics"
        raise DataError(listed_problems(heading, problems))


def score_rows(metric: RatioMetric, outputs: Sequence[str], references: Sequence[str]) -> RowScores:
    """One of the metrics that are a ratio of sums, row by row.

    - ``exact_match``: share of outputs equal to their reference, blanks at both ends aside.
    - ``slot_f1``: micro F1 over the slots of JSON texts, ``2 tp / (2 tp + fp + fn)``. A slot is a path and its
      value, such as ``args.days[0] = "Monday"``; an output that is not JSON has no slot.
    - ``token_f1``: mean over rows of the F1 of shared words, lower case, without punctuation: SQuAD's
      (arXiv 1606.05250, section 6.1) but that English articles count, as other languages have none.
    - ``rouge_l``: mean over rows of ROUGE-L's F1 (Lin 2004) by rouge-score, without stemming. Words are letters and
      digits of every script; rouge-score's own would keep only a-z and give other scripts zero.

    Args:
        metric: which.
        outputs: generated texts.
        references: wanted texts, in the same order.

    Raises:
        ValueError: the lengths differ, or there are no rows.
        DataError: ``slot_f1``, and a reference is not JSON.
        MissingPackageError: ``rouge_l``, and rouge-score is not installed.
    """
    _require_pairs(outputs, references)
    require_references([metric], references, places=[f"reference {row}" for row in range(1, len(references) + 1)])
    score = _scorer(metric)
    pairs = [score(output, reference) for output, reference in zip(outputs, references, strict=True)]
    return RowScores(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


def bleu_rows(outputs: Sequence[str], references: Sequence[str]) -> BleuRows:
    """What corpus BLEU (Papineni 2002) needs of each row, by sacrebleu: tokens ``13a``, case kept, one reference.

    Raises:
        ValueError: the lengths differ, or there are no rows.
        MissingPackageError: sacrebleu is not installed.
    """
    _require_pairs(outputs, references)
    require_packages(["bleu"])
    from sacrebleu.metrics import BLEU  # noqa: PLC0415 - belongs to an extra

    # effective_order changes only the sentence scores, which are not used; without it each one is warned about.
    bleu = BLEU(effective_order=True)
    rows = []
    for output, reference in zip(outputs, references, strict=True):
        found = bleu.sentence_score(output, [reference])
        rows.append((found.sys_len, found.ref_len, *found.counts, *found.totals))
    return BleuRows(tuple(tuple(int(count) for count in row) for row in rows))


def _corpus_bleu(sums: Sequence[float]) -> float:
    require_packages(["bleu"])
    from sacrebleu.metrics import BLEU  # noqa: PLC0415 - belongs to an extra

    counts = [int(count) for count in sums]
    # Smoothed as corpus_bleu does; compute_bleu by itself does not.
    found = BLEU.compute_bleu(
        correct=counts[2:6], total=counts[6:], sys_len=counts[0], ref_len=counts[1], smooth_method="exp"
    )
    return float(found.score)


def _require_pairs(outputs: Sequence[str], references: Sequence[str]) -> None:
    if len(outputs) != len(references) or not outputs:
        raise ValueError(f"need one output per reference, and at least one; got {len(outputs)} and {len(references)}")


def _scorer(metric: RatioMetric) -> Callable[[str, str], Ratio]:
    match metric:
        case "exact_match":
            return _exact_match
        case "slot_f1":
            return _slot_f1
        case "token_f1":
            return _token_f1
        case "rouge_l":
            return _rouge_l_scorer()


def _exact_match(output: str, reference: str) -> Ratio:
    return float(output.strip() == reference.strip()), 1.0


def _slot_f1(output: str, reference: str) -> Ratio:
    given, wanted = _slots(output) or Counter(), _slots(reference) or Counter()
    return 2.0 * (given & wanted).total(), float(given.total() + wanted.total())


def _token_f1(output: str, reference: str) -> Ratio:
    given, wanted = Counter(_words(output)), Counter(_words(reference))
    if not given and not wanted:
        return 1.0, 1.0
    return 2.0 * (given & wanted).total() / (given.total() + wanted.total()), 1.0


def _rouge_l_scorer() -> Callable[[str, str], Ratio]:
    require_packages(["rouge_l"])
    from rouge_score.rouge_scorer import RougeScorer  # noqa: PLC0415 - belongs to an extra

    scorer = RougeScorer(["rougeL"], tokenizer=_RougeWords())

    def score(output: str, reference: str) -> Ratio:
        return float(scorer.score(reference, output)["rougeL"].fmeasure), 1.0

    return score


class _RougeWords:
    """Words as rouge-score asks for them."""

    def tokenize(self, text: str) -> list[str]:
        return _words(text)


def _words(text: str) -> list[str]:
    """Runs of letters and digits, in lower case."""
    return WORD.findall(text.lower())


def _slots(text: str) -> Counter[tuple[str, str]] | None:
    """Each leaf of a JSON text as its path and its value; None where the text is not JSON."""
    try:
        value: object = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None
    return Counter(_leaves("", value))


def _leaves(path: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _leaves(f"{path}[{number}]", inner)
    else:
        yield path, json.dumps(value)
