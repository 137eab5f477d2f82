"""What the label masks of a data set really train, counted before any time is spent on training.

A wrong mask gives a healthy loss curve and a model that never stops, or learns nothing. So what cannot be right is
refused here, and what may be right is counted for the reader.
"""

from array import array
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.problems import Problems
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError


@dataclass(frozen=True)
class MaskAudit:
    """Counts over all splits.

    Attributes:
        rows: rows that were encoded.
        encoded: rows that are used, pieces of rows that were split among them; other rows were dropped.
        dropped_overlong: rows dropped because they are longer than the window.
        truncated: used rows that lost tokens at their beginning to fit the window.
        split: rows that were split into pieces to fit the window.
        rows_without_labels: rows dropped because no token of them would be trained.
        tokens: of the used rows.
        label_tokens: of these, tokens that the loss is taken on.
        longest_row: tokens of the longest used row.
        median_row: tokens of the used row in the middle.
        double_bos: used rows that begin with two bos tokens.
        double_bos_places: where the first of them stand.
        prompt_differs: used rows whose beginning is not what generation is started with, token for token.
        stop_token_id: the most common last trained token; None where nothing is trained.
        stop_token_trained_share: share of the used rows whose last trained token is one that generation stops at; the
            pieces of a split row but its last need none.
    """

    rows: int
    encoded: int
    dropped_overlong: int
    truncated: int
    split: int
    rows_without_labels: int
    tokens: int
    label_tokens: int
    longest_row: int
    median_row: int
    double_bos: int
    double_bos_places: tuple[str, ...]
    prompt_differs: int
    stop_token_id: int | None
    stop_token_trained_share: float

    @property
    def used_rows(self) -> int:
        """Rows that are used, whole or in pieces."""
        return self.rows - self.dropped_overlong - self.rows_without_labels

    @property
    def label_share(self) -> float:
        """Label tokens over tokens; 0 where there are none."""
        return self.label_tokens / self.tokens if self.tokens else 0.0


class MaskTally:
    """Counts what is trained, row by row; ``audit`` gives the counts so far."""

    def __init__(self, *, bos_id: int | None, stop_ids: Collection[int]) -> None:
        """Nothing is counted yet.

        Args:
            bos_id: id of the bos token, if there is one.
            stop_ids: ids that generation stops at.
        """
        self._bos_id, self._stop_ids = bos_id, frozenset(stop_ids)
        self._counts: Counter[str] = Counter()
        self._lengths = array("i")
        self._last_labels: Counter[int] = Counter()
        self._double_bos = Problems()

    def add(self, row: EncodedRow, fitted: Sequence[EncodedRow], *, place: str = "") -> list[EncodedRow]:
        """Counts one row and gives what of it is used.

        Args:
            row: as it was encoded.
            fitted: what the window left of it.
            place: file and line, for messages.
        """
        used = [piece for piece in fitted if piece.label_count]
        self._counts["rows"] += 1
        self._counts["dropped_overlong"] += not fitted
        self._counts["truncated"] += len(fitted) == 1 and len(fitted[0].token_ids) < len(row.token_ids)
        self._counts["split"] += len(fitted) > 1
        self._counts["rows_without_labels"] += bool(fitted) and not used
        for piece in used:
            self._count(piece, place)
        if used:
            self._last_labels[_last_label(used[-1])] += 1
        return used

    def audit(self) -> MaskAudit:
        """The counts of all rows that were added."""
        counts, ends = self._counts, self._last_labels
        stopping = sum(count for label, count in ends.items() if label in self._stop_ids)
        lengths = sorted(self._lengths)
        return MaskAudit(
            rows=counts["rows"],
            encoded=len(lengths),
            dropped_overlong=counts["dropped_overlong"],
            truncated=counts["truncated"],
            split=counts["split"],
            rows_without_labels=counts["rows_without_labels"],
            tokens=sum(lengths),
            label_tokens=counts["label_tokens"],
            longest_row=lengths[-1] if lengths else 0,
            median_row=lengths[len(lengths) // 2] if lengths else 0,
            double_bos=self._double_bos.count,
            double_bos_places=tuple(self._double_bos.shown),
            prompt_differs=counts["prompt_differs"],
            stop_token_id=ends.most_common(1)[0][0] if ends else None,
            stop_token_trained_share=stopping / ends.total() if ends else 0.0,
        )

    def _count(self, piece: EncodedRow, place: str) -> None:
        self._lengths.append(len(piece.token_ids))
        self._counts["label_tokens"] += piece.label_count
        self._counts["prompt_differs"] += piece.token_ids[: len(piece.prompt_ids)] != piece.prompt_ids
        if self._bos_id is not None and piece.token_ids[:2] == (self._bos_id, self._bos_id):
            self._double_bos.add(place)


def audit_masks(
    encoded: Iterable[EncodedRow],
    fitted: Iterable[Sequence[EncodedRow]],
    *,
    bos_id: int | None,
    stop_ids: Collection[int],
) -> MaskAudit:
    """Counts what is trained.

    Args:
        encoded: all rows.
        fitted: what the window left of each of them.
        bos_id: id of the bos token, if there is one.
        stop_ids: ids that generation stops at.
    """
    tally = MaskTally(bos_id=bos_id, stop_ids=stop_ids)
    for row, kept in zip(encoded, fitted, strict=True):
        tally.add(row, kept)
    return tally.audit()


def require_sound(
    audit: MaskAudit, tokenizer: TextTokenizer, *, window: int, accept_untrained_stop: bool = False
) -> None:
    """Refuses a data set that cannot train what was asked for.

    Args:
        audit: of the data set.
        tokenizer: of the base model.
        window: longest row in tokens.
        accept_untrained_stop: whether rows without a trained stop token are wanted; ``audit_notes`` tells of them.

    Raises:
        DataError: every row is longer than the window; no row has a trainable token; a row begins with two bos tokens,
            which no runtime would give the model; or no row trains a token that generation stops at, so that the tuned
            model would never end an answer.
    """
    if audit.encoded == 0:
        raise DataError(_nothing_left(audit, window))
    if audit.double_bos:
        raise DataError(_begins_twice(audit, tokenizer))
    if audit.stop_token_trained_share == 0.0 and not accept_untrained_stop:
        raise DataError(_never_stops(audit, tokenizer))


def audit_notes(audit: MaskAudit) -> list[str]:
    """One sentence for each count that the reader should know, with the mend where there is one."""
    unstopped = round(audit.used_rows * (1.0 - audit.stop_token_trained_share))
    counted = (
        (audit.dropped_overlong, f"of {audit.rows} rows dropped: longer than data.window"),
        (audit.truncated, "rows cut at their beginning to fit data.window"),
        (audit.rows_without_labels, "rows dropped: no token of them would be trained"),
        (audit.split, "rows split into pieces to fit data.window"),
        (
            audit.prompt_differs,
            "rows begin otherwise than generation does: the chat template's generation prompt is not what it writes "
            "before an answer; mend the template",
        ),
        (unstopped, _unstopped_note(audit)),
    )
    return [f"{count} {text}" for count, text in counted if count]


def _unstopped_note(audit: MaskAudit) -> str:
    text = f"of {audit.used_rows} rows do not train a stop token at their end"
    if audit.stop_token_trained_share:
        return text
    return (
        f"{text}, which data.accept_untrained_stop accepts: the tuned model does not learn to end an answer and "
        "writes until a limit of tokens stops it"
    )


def _last_label(row: EncodedRow) -> int:
    return next(label for label in reversed(row.labels) if label != IGNORE_INDEX)


def _nothing_left(audit: MaskAudit, window: int) -> str:
    problems = []
    if audit.dropped_overlong:
        problems.append(
            f"{audit.dropped_overlong} of {audit.rows} rows are longer than data.window, {window} tokens. Raise it, or "
            "set data.overlong: truncate_prompt (with format: text, data.overlong: split)"
        )
    if audit.rows_without_labels:
        problems.append(
            f"{audit.rows_without_labels} of {audit.rows} rows have no trainable token. Put {{% generation %}} and "
            "{% endgeneration %} around what the assistant writes in the chat template; a copy can be named as "
            "data.chat_template"
        )
    return "\n".join(["no row is left to train on:", *(f"  {problem}" for problem in problems)])


def _begins_twice(audit: MaskAudit, tokenizer: TextTokenizer) -> str:
    first = "".join(f"\n  {place}" for place in audit.double_bos_places if place)
    return (
        f"{audit.double_bos} of {audit.encoded} rows begin with two bos tokens ({tokenizer.bos_text!r}), which no "
        "runtime gives the model. If all do, the template writes one too many: mend a copy of it and name that as "
        "data.chat_template, or take it out of data.text_template. If some do, their text begins with it: remove it "
        f"there.{first and ' The first:'}{first}"
    )


def _never_stops(audit: MaskAudit, tokenizer: TextTokenizer) -> str:
    stops = ", ".join(f"{stop} {tokenizer.decode([stop], skip_special=False)!r}" for stop in tokenizer.stop_ids)
    last = [] if audit.stop_token_id is None else [audit.stop_token_id]
    return (
        f"no row trains a token that generation stops at ({stops}): the last trained token is mostly "
        f"{audit.stop_token_id} {tokenizer.decode(last, skip_special=False)!r}, so the tuned model would never end an "
        "answer. Let the chat template write the stop token inside its generation block (or the last message; a mended "
        "copy can be named as data.chat_template), or name "
        "the token that it does write as eos_token_id in the base model's generation_config.json. To train such rows "
        "all the same, set data.accept_untrained_stop: true"
    )
