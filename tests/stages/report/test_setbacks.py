from dataclasses import replace

from qlora_trainer.records import TrainedAdapter
from qlora_trainer.stages.report.inputs import Measurements
from qlora_trainer.stages.report.setbacks import setbacks


def test_a_smooth_training_has_none(measurements: Measurements) -> None:
    assert setbacks(measurements.trained) == ()


def test_each_kind_is_one_sentence_that_counts_and_names_the_first(measurements: Measurements) -> None:
    trained: TrainedAdapter = replace(
        measurements.trained,
        skipped_steps=tuple((step, f"loss is nan in train.jsonl:{step}") for step in (3, 5, 8, 13)),
        incidents=((200, "the loss diverges"),),
        damaged_checkpoints=((100, "step-000200 is damaged (checksums.json is missing or damaged)"),),
    )
    skipped, warned, damaged = setbacks(trained)
    assert skipped.startswith(
        f"Training skipped 4 of {trained.steps} steps, which changed nothing: step 3: loss is nan"
    )
    assert skipped.endswith("; and 1 more.")
    assert warned == "The watchdog warned while training (1): step 200: the loss diverges."
    assert "an earlier checkpoint" in damaged
    assert "step 100: step-000200 is damaged" in damaged
