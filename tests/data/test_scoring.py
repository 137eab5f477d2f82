import json
import random
from importlib.machinery import ModuleSpec

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu import corpus_bleu

from qlora_trainer.data import scoring
from qlora_trainer.data.scoring import (
    RowScores,
    bleu_rows,
    missing_packages,
    require_packages,
    require_references,
    score_rows,
)
from qlora_trainer.errors import DataError, MissingPackageError

WORDS = ["the", "a", "fox", "dog", "jumps", "over", "Monday,", "table.", "book", "7", "seven", "evening"]


def sentences(count: int, *, seed: int) -> list[str]:
    """Word sequences of which some are empty; two seeds share their words but not their order."""
    source = random.Random(seed)
    return [" ".join(source.choices(WORDS, k=source.randrange(12))) for _ in range(count)]


def test_exact_match_is_the_share_of_equal_texts_and_ignores_blanks_at_both_ends() -> None:
    scores = score_rows("exact_match", ["a b", " a b\n", "a  b", "A b"], ["a b"] * 4)
    assert scores == RowScores((1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0))
    assert scores.value == 0.5


def test_slot_f1_counts_slots_over_all_rows() -> None:
    wanted = {"intent": "book", "args": {"people": 2, "days": ["Mon", "Tue"]}}
    given = {"args": {"people": 2, "days": ["Mon"], "late": True}, "intent": "cancel"}
    scores = score_rows("slot_f1", [json.dumps(given), json.dumps(wanted)], [json.dumps(wanted)] * 2)
    # Row 1: people and days[0] of four wanted and four given; row 2: all four.
    assert scores == RowScores((4.0, 8.0), (8.0, 8.0))
    assert scores.value == 12 / 16


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ('{"b": 2, "a": 1}', 1.0),
        ('{"a": 1, "b": 2} trailing', 0.0),
        ('{"a": 1', 0.0),
        ('{"a": "1", "b": true}', 0.0),
        ('{"a": 1}', 2 / 3),
        ("", 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_slot_f1_of_one_row(output: str, expected: float) -> None:
    assert score_rows("slot_f1", [output], ['{"a": 1, "b": 2}']).value == pytest.approx(expected, abs=1e-12)


def test_an_empty_object_is_a_slot_of_its_own() -> None:
    assert score_rows("slot_f1", ['{"args": {}}'], ['{"args": {}}']).value == 1.0
    assert score_rows("slot_f1", ['{"args": []}'], ['{"args": {}}']).value == 0.0


def test_references_that_are_not_json_are_refused_for_slot_f1_only() -> None:
    references, places = ["{}", "Hello", "{"], ["a:1", "a:2", "a:3"]
    with pytest.raises(DataError, match=r"2 problems\n  a:2: not JSON: 'Hello'\n  a:3: not JSON: '\{'"):
        require_references(["exact_match", "slot_f1"], references, places=places)
    with pytest.raises(DataError, match="reference 2: not JSON"):
        score_rows("slot_f1", ["{}"] * 3, references)
    require_references(["exact_match"], references, places=places)


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("The fox!", "the FOX", 1.0),
        ("the fox the", "the fox", 2 * 2 / 5),
        ("cat", "dog", 0.0),
        ("", "", 1.0),
        ("", "dog", 0.0),
        ("안녕 하세요", "안녕 여러분", 0.5),
    ],
)
def test_token_f1_of_one_row(output: str, reference: str, expected: float) -> None:
    assert score_rows("token_f1", [output], [reference]).value == pytest.approx(expected, abs=1e-12)


def test_rouge_l_of_ascii_text_is_that_of_rouge_score() -> None:
    outputs, references = sentences(60, seed=1), sentences(60, seed=2)
    oracle = RougeScorer(["rougeL"])
    expected = [
        oracle.score(reference, output)["rougeL"].fmeasure
        for output, reference in zip(outputs, references, strict=True)
    ]
    scores = score_rows("rouge_l", outputs, references)
    assert list(scores.numerators) == expected
    assert scores.value == pytest.approx(sum(expected) / 60, abs=1e-12)
    assert 0.1 < scores.value < 0.9


def test_rouge_l_reads_every_script() -> None:
    assert score_rows("rouge_l", ["하루가 또 가네요."], ["하루가 또 가네요"]).value == 1.0


def test_bleu_of_all_rows_is_corpus_bleu_of_sacrebleu() -> None:
    outputs, references = sentences(80, seed=1), sentences(80, seed=2)
    oracle = corpus_bleu(outputs, [references]).score
    assert bleu_rows(outputs, references).value == oracle
    assert 1.0 < oracle < 99.0


def test_bleu_of_resamples_is_corpus_bleu_of_their_rows() -> None:
    outputs, references = sentences(30, seed=1), sentences(30, seed=2)
    rows = bleu_rows(outputs, references)
    drawn = np.random.default_rng(0).integers(30, size=(5, 30))
    oracle = [corpus_bleu([outputs[row] for row in draw], [[references[row] for row in draw]]).score for draw in drawn]
    sums = np.asarray(rows.statistics, dtype=np.float64)[drawn].sum(axis=1)
    assert rows.combine(sums).tolist() == oracle
    assert len(set(oracle)) == 5


def test_bleu_of_equal_texts_is_100_and_of_nothing_0() -> None:
    texts = [text for text in sentences(40, seed=1) if len(text.split()) > 4]
    assert bleu_rows(texts, texts).value == pytest.approx(100.0, abs=1e-9)
    assert bleu_rows([""] * len(texts), texts).value == 0.0


@pytest.mark.parametrize("metric", ["exact_match", "token_f1"])
def test_outputs_and_references_must_be_pairs(metric: scoring.RatioMetric) -> None:
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_rows(metric, ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="got 0 and 0"):
        score_rows(metric, [], [])
    with pytest.raises(ValueError, match="got 0 and 0"):
        bleu_rows([], [])


def test_nothing_wanted_and_nothing_given_scores_nothing() -> None:
    assert RowScores((0.0,), (0.0,)).value == 0.0


def test_installed_packages_are_not_missing() -> None:
    assert missing_packages(["exact_match", "rouge_l", "bleu"]) == []


def test_missing_packages_are_told_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing_installed(name: str) -> ModuleSpec | None:
        return None

    monkeypatch.setattr(scoring, "find_spec", nothing_installed)
    assert missing_packages(["exact_match", "slot_f1", "token_f1"]) == []
    assert missing_packages(["rouge_l", "exact_match", "bleu"]) == ["rouge-score", "sacrebleu"]
    with pytest.raises(MissingPackageError, match=r"rouge-score and sacrebleu.*pip install 'qlora-trainer\[eval\]'"):
        require_packages(["rouge_l", "bleu"])
    with pytest.raises(MissingPackageError, match="needs rouge-score"):
        score_rows("rouge_l", ["a"], ["a"])
    with pytest.raises(MissingPackageError, match="needs sacrebleu"):
        bleu_rows(["a"], ["a"])
    assert score_rows("exact_match", ["a"], ["a"]).value == 1.0
