"""Answers of every stage to the same prompts, side by side, with the words marked in which they differ."""

from collections.abc import Mapping

from qlora_trainer.pages.blocks import Block, Outputs, Section, Text
from qlora_trainer.pages.compared import Compared, compare_answers
from qlora_trainer.records import Evaluation, Sample
from qlora_trainer.stages.report.inputs import BASE, QUANTIZED, TRAINED, Shown

TOLD = (
    "The first generated test rows, by greedy decoding. Underlined words stand only in this answer, words struck out "
    "only in what it is compared with: the quantized base with the 16-bit base, the trained model with the reference, "
    "merged model and files with the trained model."
)
REFERENCE = "the reference"


def samples(shown: Shown) -> Section:
    """One block for each prompt."""
    evaluations = {each.stage: each for each in shown.measurements.evaluations if each.samples}
    blocks: tuple[Block, ...] = ()
    if evaluations:
        prompts = next(iter(evaluations.values())).samples
        asked = (_outputs(number, sample, evaluations) for number, sample in enumerate(prompts, start=1))
        blocks = (Text(TOLD, is_soft=True), *asked)
    return Section("samples", "Sample outputs", blocks)


def _outputs(number: int, asked: Sample, evaluations: Mapping[str, Evaluation]) -> Outputs:
    """What every stage that was asked this prompt answered."""
    answers = {
        stage: sample.output
        for stage, evaluation in evaluations.items()
        for sample in evaluation.samples
        if sample.prompt == asked.prompt
    }
    compared = tuple(_compared(stage, answers, asked.reference) for stage in answers)
    return Outputs(number, asked.prompt, asked.reference, compared)


def _compared(stage: str, answers: Mapping[str, str], reference: str) -> Compared:
    if stage == BASE:
        return compare_answers(stage, answers[stage], other=None, against="")
    if stage == TRAINED:
        return compare_answers(stage, answers[stage], other=reference, against=REFERENCE)
    other = BASE if stage == QUANTIZED else TRAINED
    return compare_answers(stage, answers[stage], other=answers.get(other), against=other)
