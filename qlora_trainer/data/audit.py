"""What the label masks of a data set really train, counted before any time is spent on training.

A wrong mask gives a healthy loss curve and a model that never stops, or learns nothing. So what cannot be right is
refused here, and what may be right is counted for the reader.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.errors import DataError


@dataclass(frozen=True)
class MaskAudit:
    """Counts over all splits.

    Attributes:
        rows: rows that were encoded.
        encoded: rows that are used; the others were dropped.
        dropped_overlong: rows dropped because they are longer than the window.
        truncated: used rows that lost tokens at their beginning to fit the window.
        rows_without_labels: rows dropped because no token of them would be trained.
        tokens: of the used rows.
        label_tokens: of these, tokens that the loss is taken on.
        longest_row: tokens of the longest used row.
        double_bos: used rows that begin with two bos tokens.
        prompt_differs: used rows whose beginning is not what generation is started with, token for token.
        stop_token_id: the most common last trained token; None where nothing is trained.
        stop_token_trained_share: share of the used rows whose last trained token is one that generation stops at.
    """

    rows: int
    encoded: int
    dropped_overlong: int
    truncated: int
    rows_without_labels: int
    tokens: int
    label_tokens: int
    longest_row: int
    double_bos: int
    prompt_differs: int
    stop_token_id: int | None
    stop_token_trained_share: float

    @property
    def label_share(self) -> float:
        """Label tokens over tokens; 0 where there are none."""
        return self.label_tokens / self.tokens if self.tokens else 0.0


def audit_masks(
    encoded: Sequence[EncodedRow],
    fitted: Sequence[EncodedRow | None],
    *,
    bos_id: int | None,
    stop_ids: Collection[int],
) -> MaskAudit:
    """Counts what is trained.

    Args:
        encoded: all rows.
        fitted: the same rows after ``fit_window``.
        bos_id: id of the bos token, if there is one.
        stop_ids: ids that generation stops at.
    """
    kept = [row for row in fitted if row is not None]
    used = [row for row in kept if row.label_count]
    last_labels = Counter(_last_label(row) for row in used)
    stopping = sum(count for label, count in last_labels.items() if label in stop_ids)
    return MaskAudit(
        rows=len(encoded),
        encoded=len(used),
        dropped_overlong=len(encoded) - len(kept),
        truncated=sum(
            after is not None and len(after.token_ids) < len(before.token_ids)
            for before, after in zip(encoded, fitted, strict=True)
        ),
        rows_without_labels=len(kept) - len(used),
        tokens=sum(len(row.token_ids) for row in used),
        label_tokens=sum(row.label_count for row in used),
        longest_row=max((len(row.token_ids) for row in used), default=0),
        double_bos=sum(row.token_ids[:2] == (bos_id, bos_id) for row in used),
        prompt_differs=sum(row.token_ids[: len(row.prompt_ids)] != row.prompt_ids for row in used),
        stop_token_id=last_labels.most_common(1)[0][0] if last_labels else None,
        stop_token_trained_share=stopping / len(used) if used else 0.0,
    )


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
        DataError: every row is longer than the window; no row has a trainable token; or no row trains a token that
            generation stops at, so that the tuned model would never end an answer.
    """
    if audit.encoded == 0:
        raise DataError(_nothing_left(audit, window))
    if audit.stop_token_trained_share == 0.0 and not accept_untrained_stop:
        raise DataError(_never_stops(audit, tokenizer))


def audit_notes(audit: MaskAudit) -> list[str]:
    """One sentence for each count that the reader should know, with the mend where there is one."""
    unstopped = round(audit.encoded * (1.0 - audit.stop_token_trained_share))
    counted = (
        (audit.dropped_overlong, f"of {audit.rows} rows dropped: longer than data.window"),
        (audit.truncated, "rows cut at their beginning to fit data.window"),
        (audit.rows_without_labels, "rows dropped: no token of them would be trained"),
        (audit.double_bos, "rows begin with two bos tokens; remove one from the data or the template"),
        (
            audit.prompt_differs,
            "rows begin otherwise than generation does: the chat template's generation prompt is not what it writes "
            "before an answer; mend the template",
        ),
        (unstopped, _unstopped_note(audit)),
    )
    return [f"{count} {text}" for count, text in counted if count]


def _unstopped_note(audit: MaskAudit) -> str:
    text = f"of {audit.encoded} rows do not train a stop token at their end"
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
            "set data.overlong: truncate_prompt"
        )
    if audit.rows_without_labels:
        problems.append(
            f"{audit.rows_without_labels} of {audit.rows} rows have no trainable token. Put {{% generation %}} and "
            "{% endgeneration %} around what the assistant writes in the chat template"
        )
    return "\n".join(["no row is left to train on:", *(f"  {problem}" for problem in problems)])


def _never_stops(audit: MaskAudit, tokenizer: TextTokenizer) -> str:
    stops = ", ".join(f"{stop} {tokenizer.decode([stop], skip_special=False)!r}" for stop in tokenizer.stop_ids)
    last = [] if audit.stop_token_id is None else [audit.stop_token_id]
    return (
        f"no row trains a token that generation stops at ({stops}): the last trained token is mostly "
        f"{audit.stop_token_id} {tokenizer.decode(last, skip_special=False)!r}, so the tuned model would never end an "
        "answer. Let the chat template write the stop token inside its generation block (or the last message), or name "
        "the token that it does write as eos_token_id in the base model's generation_config.json. To train such rows "
        "all the same, set data.accept_untrained_stop: true"
    )
