import pytest

from qlora_trainer.data.audit import MaskAudit, MaskTally, audit_masks, audit_notes, require_sound
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError
from tests.models import BOS_ID, EOS_ID, tiny_tokenizer


def row(prompt: list[int], completion: list[int], *, prompt_ids: list[int] | None = None) -> EncodedRow:
    labels = (*[IGNORE_INDEX] * len(prompt), *completion)
    return EncodedRow((*prompt, *completion), labels, tuple(prompt if prompt_ids is None else prompt_ids), "", "")


def audited(rows: list[EncodedRow], fitted: list[EncodedRow | None] | None = None) -> MaskAudit:
    kept = rows if fitted is None else fitted
    return audit_masks(rows, [() if row is None else (row,) for row in kept], bos_id=BOS_ID, stop_ids=(EOS_ID,))


GOOD = row([BOS_ID, 10, 11], [12, EOS_ID])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer.load(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def test_sound_rows_have_nothing_to_note(tokenizer: TextTokenizer) -> None:
    audit = audited([GOOD, GOOD])
    assert audit == MaskAudit(
        rows=2,
        encoded=2,
        dropped_overlong=0,
        truncated=0,
        split=0,
        rows_without_labels=0,
        tokens=10,
        label_tokens=4,
        longest_row=5,
        median_row=5,
        double_bos=0,
        double_bos_places=(),
        prompt_differs=0,
        stop_token_id=EOS_ID,
        stop_token_trained_share=1.0,
    )
    assert audit.label_share == 0.4
    assert audit_notes(audit) == []
    require_sound(audit, tokenizer, window=8)


def test_everything_that_the_reader_should_know_is_counted() -> None:
    long, cut, empty = row([BOS_ID, *range(10, 30)], [5, EOS_ID]), row([BOS_ID, 29], [5, EOS_ID]), row([BOS_ID, 10], [])
    doubled, unstopped = row([BOS_ID, BOS_ID, 10], [12, EOS_ID]), row([BOS_ID, 10], [12, 13])
    different = row([BOS_ID, 10], [12, EOS_ID], prompt_ids=[BOS_ID, 10, 11])
    audit = audited(
        [long, long, empty, doubled, unstopped, different], [None, cut, empty, doubled, unstopped, different]
    )
    assert audit == MaskAudit(
        rows=6,
        encoded=4,
        dropped_overlong=1,
        truncated=1,
        split=0,
        rows_without_labels=1,
        tokens=4 + 5 + 4 + 4,
        label_tokens=8,
        longest_row=5,
        median_row=4,
        double_bos=1,
        double_bos_places=("",),
        prompt_differs=1,
        stop_token_id=EOS_ID,
        stop_token_trained_share=0.75,
    )
    assert [note.split(" ", 1)[0] for note in audit_notes(audit)] == ["1"] * 5
    assert audit_notes(audit)[0] == "1 of 6 rows dropped: longer than data.window"
    assert audit_notes(audit)[-1] == "1 of 4 rows do not train a stop token at their end"


def test_a_label_on_the_first_token_is_not_counted() -> None:
    alone = EncodedRow((EOS_ID,), (EOS_ID,), (), "", "")
    assert audited([GOOD, alone]).rows_without_labels == 1


def test_no_row_left_is_refused_with_every_reason(tokenizer: TextTokenizer) -> None:
    unlabelled = row([BOS_ID, 10], [])
    audit = audited([GOOD, GOOD, unlabelled], [None, None, unlabelled])
    with pytest.raises(DataError) as caught:
        require_sound(audit, tokenizer, window=4)
    text = str(caught.value)
    assert "2 of 3 rows are longer than data.window, 4 tokens" in text
    assert "1 of 3 rows have no trainable token. Put {% generation %} and {% endgeneration %} around" in text
    assert audit.label_share == 0.0


def test_a_stop_token_that_no_row_trains_is_refused(tokenizer: TextTokenizer) -> None:
    other = tokenizer.token_id("<|user|>")
    assert other is not None
    audit = audited([row([BOS_ID, 10], [12, other]), row([BOS_ID, 10], [13, other])])
    with pytest.raises(DataError, match=rf"stops at \({EOS_ID} '</s>'\).* mostly {other} '<\|user\|>'"):
        require_sound(audit, tokenizer, window=8)


def test_an_untrained_stop_token_may_be_accepted_and_is_said_aloud(tokenizer: TextTokenizer) -> None:
    audit = audited([row([BOS_ID, 10], [12, 13]), row([BOS_ID, 10], [12, 14])])
    with pytest.raises(DataError, match=r"set data\.accept_untrained_stop: true"):
        require_sound(audit, tokenizer, window=8)
    require_sound(audit, tokenizer, window=8, accept_untrained_stop=True)
    assert audit_notes(audit) == [
        "2 of 2 rows do not train a stop token at their end, which data.accept_untrained_stop accepts: the tuned model "
        "does not learn to end an answer and writes until a limit of tokens stops it"
    ]


def test_rows_that_train_nothing_are_refused_even_where_an_untrained_stop_token_is_accepted(
    tokenizer: TextTokenizer,
) -> None:
    with pytest.raises(DataError, match="no row is left to train on"):
        require_sound(audited([row([BOS_ID, 10], [])]), tokenizer, window=8, accept_untrained_stop=True)


def test_one_row_that_stops_is_no_error_but_a_note(tokenizer: TextTokenizer) -> None:
    audit = audited([GOOD, row([BOS_ID, 10], [12, 13])])
    require_sound(audit, tokenizer, window=8)
    assert audit_notes(audit) == ["1 of 2 rows do not train a stop token at their end"]


def test_the_constants_of_these_tests_are_ids_of_the_tokenizer(tokenizer: TextTokenizer) -> None:
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (BOS_ID, (EOS_ID,))


def test_rows_that_begin_with_two_bos_tokens_are_refused_with_their_places(tokenizer: TextTokenizer) -> None:
    tally = MaskTally(bos_id=BOS_ID, stop_ids=(EOS_ID,))
    doubled = row([BOS_ID, BOS_ID, 10], [12, EOS_ID])
    for number, each in enumerate([GOOD, doubled, GOOD, doubled], start=1):
        tally.add(each, (each,), place=f"a.jsonl:{number}")
    with pytest.raises(DataError) as caught:
        require_sound(tally.audit(), tokenizer, window=8)
    text = str(caught.value)
    assert text.startswith("2 of 4 rows begin with two bos tokens ('<s>')")
    assert text.endswith("The first:\n  a.jsonl:2\n  a.jsonl:4")


def test_a_split_row_counts_once_and_only_its_last_piece_needs_a_stop_token() -> None:
    whole = row([], [10, 11, 12, 13, EOS_ID])
    pieces = (row([10], [11, 12]), row([12], [13, EOS_ID]))
    audit = audit_masks([whole], [pieces], bos_id=BOS_ID, stop_ids=(EOS_ID,))
    assert (audit.rows, audit.encoded, audit.used_rows, audit.split, audit.truncated) == (1, 2, 1, 1, 0)
    assert audit.stop_token_trained_share == 1.0
    assert audit_notes(audit) == ["1 rows split into pieces to fit data.window"]
