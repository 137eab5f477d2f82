"""Recipes: what is refused, what follows from what."""

import pytest
from pydantic import ValidationError

from qlora_trainer.recipe import Lora, Quantization, Recipe, Section, Training

SMALLEST: dict[str, object] = {
    "run": {"name": "tiny"},
    "base_model": {"path": "models/tiny"},
    "data": {"train": "rows.jsonl", "validation_rows": 10, "test_rows": 10},
    "training": {"max_steps": 5},
}


def recipe_with(section: str, **settings: object) -> Recipe:
    former = SMALLEST.get(section, {})
    assert isinstance(former, dict)
    return Recipe.model_validate({**SMALLEST, section: {**former, **settings}})


def sections_of_a_recipe() -> list[type[Section]]:
    return [type(value) for _, value in recipe_with("expected", **EXPECTED) if isinstance(value, Section)]


EXPECTED = {"hardware": "2 cores", "measured": "2026-01-15", "nats_per_token": {"base_16bit": 1.0}, "within": 0.02}


def test_four_sections_make_a_whole_recipe() -> None:
    recipe = Recipe.model_validate(SMALLEST)
    assert recipe.lora == Lora()
    assert recipe.expected is None


def test_every_section_and_setting_is_documented() -> None:
    for section in sections_of_a_recipe():
        assert section.__doc__
        assert section.__doc__ != Section.__doc__
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Recipe.model_validate(SMALLEST).run.name = "other"  # type: ignore[misc]  # the point of the test


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("lora", {"rank": 16.0}),
        ("lora", {"rank": "16"}),
        ("lora", {"rank": 0}),
        ("lora", {"use_dora": 1}),
        ("lora", {"dropout": 1.0}),
        ("lora", {"target_modules": []}),
        ("lora", {"rnak": 16}),
        ("training", {"learning_rate": "2e-4"}),
        ("training", {"learning_rate": 0.0}),
        ("run", {"name": "two words"}),
        ("run", {"name": "../elsewhere"}),
        ("evaluation", {"metrics": ["accuracy"]}),
        ("export", {"formats": ["gguf"]}),
    ],
)
def test_a_wrong_value_is_refused_and_not_converted(section: str, settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        recipe_with(section, **settings)
    assert all(error["loc"][:2] == (section, *settings) for error in caught.value.errors())


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("base_model", {"name": "owner/model"}, "exactly one of 'path'"),
        ("base_model", {"path": None}, "exactly one of 'path'"),
        ("base_model", {"revision": "main"}, "'revision' belongs to 'name'"),
        ("quantization", {"data_type": "int8", "double_quant": True}, "no meaning for int8"),
        ("quantization", {"data_type": "gptq_int4", "double_quant": True}, r"no meaning for gptq_int4 \(one bfloat16"),
        ("quantization", {"data_type": "none", "double_quant": True}, r"no meaning for none \(nothing is quantized\)"),
        (
            "quantization",
            {"data_type": "nf4", "group_size": 32},
            "group_size: 32 has no meaning for nf4; remove it, or",
        ),
        ("quantization", {"data_type": "none", "group_size": 64}, "group_size: 64 has no meaning for none"),
        ("lora", {"use_dora": True, "init": "pissa"}, "use_dora needs init: default"),
        ("data", {"render": "text", "format": "messages"}, "render: text reads prompt and completion"),
        ("data", {"render": "text", "text_template": "Q: "}, r"must hold \{prompt\}"),
        ("data", {"stop_token": "</s>"}, "stop_token is for render: text"),
        ("data", {"render": "text", "accept_untrained_stop": True}, "accept_untrained_stop is for render: chat"),
        ("data", {"test_rows": None}, "give test"),
        ("training", {"epochs": 1.0}, "exactly one of 'max_steps' and 'epochs'"),
        ("training", {"max_steps": None}, "exactly one of 'max_steps' and 'epochs'"),
        ("export", {"formats": ["peft_adapter", "peft_adapter"]}, "repeats peft_adapter"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    section: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_with(section, **settings)


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("merge", {"into": "original"}, "merge.into: dequantized"),
        ("quantization", {"data_type": "int8"}, "loftq repairs 4-bit bases"),
        ("quantization", {"data_type": "gptq_int4"}, "loftq repairs 4-bit bases of nf4 or fp4, not of .*: gptq_int4"),
        ("quantization", {"data_type": "none"}, "loftq repairs 4-bit bases"),
    ],
)
def test_loftq_is_refused_where_it_would_repair_the_wrong_base(
    section: str, settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**SMALLEST, "lora": {"init": "loftq"}, section: settings})


@pytest.mark.parametrize(
    ("settings", "doubly"),
    [
        ({}, True),
        ({"double_quant": False}, False),
        ({"data_type": "int8"}, False),
        ({"data_type": "fp4"}, True),
        ({"data_type": "gptq_int4"}, False),
        ({"data_type": "none"}, False),
    ],
)
def test_bases_with_absmax_constants_are_doubly_quantized_unless_told_otherwise(
    settings: dict[str, object], doubly: bool
) -> None:
    assert Quantization.model_validate(settings).doubly_quantized is doubly


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"quantization": {"data_type": "gptq_int4"}, "lora": {"init": "pissa"}},
            "pissa takes the principal part .* use nf4, fp4, int8 or none, or set lora.init: default",
        ),
        (
            {"quantization": {"data_type": "none"}, "merge": {"into": "dequantized"}},
            "data_type: none quantizes nothing; set merge.into: original, or remove it",
        ),
    ],
)
def test_sections_that_a_base_does_not_go_with_are_refused(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Recipe.model_validate({**SMALLEST, **sections})


def test_groups_are_64_wide_unless_told_otherwise() -> None:
    assert Quantization(data_type="gptq_int4").inputs_per_scale == 64
    assert Quantization(data_type="gptq_int4", group_size=128).inputs_per_scale == 128


def test_calibration_shapes_a_run_whose_base_is_made_on_rows() -> None:
    calibrated = Recipe.model_validate({**SMALLEST, "quantization": {"data_type": "gptq_int4"}})
    assert set(calibrated.shaping) - set(Recipe.model_validate(SMALLEST).shaping) == {
        "calibration",
        "rounding.damping",
        "rounding.activation_order",
    }


def test_the_scale_is_alpha_over_rank_and_over_its_root_for_rslora() -> None:
    assert Lora(rank=16, alpha=32.0).scale == 2.0
    assert Lora(rank=16, alpha=32.0, use_rslora=True).scale == 8.0


def test_the_batch_size_is_a_product() -> None:
    assert Training(max_steps=1, micro_batch_size=3, gradient_accumulation_steps=5).batch_size == 15
