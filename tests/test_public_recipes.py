"""Recipes for public models: their sizes, memory, template and stop token, and two steps of each architecture."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from qlora_trainer import pipeline, recipe_file
from qlora_trainer.data.encode import IGNORE_INDEX, EncodedRow
from qlora_trainer.data.tokenizer import TextTokenizer
from qlora_trainer.export_formats import FACTS, missing_modules, unfit_layers
from qlora_trainer.numerics.footprint import Footprint
from qlora_trainer.numerics.model_shape import ModelShape
from qlora_trainer.preflight.prediction import cuts, memory_predictions, training_load
from qlora_trainer.recipe import BaseModelSource, Recipe
from qlora_trainer.stages import base_model, dataset
from tests.public_models import CONFIGS, family_of, public_config, stand_in, write_tokenizer

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
PATHS = sorted(path for path in RECIPES.glob("*gb.yaml"))
CARD = re.compile(r"one (\d+) GB GPU(?: and (\d+) GB of memory)?\. Not run: ")
GIB = 2**30

# Parameters in millions as the model cards tell them; a wrong size in a config would show here.
PARAMETERS = {
    "gemma3_1b": 1000,
    "gemma3_4b": 3880,
    "llama3.1_8b": 8030,
    "llama3.2_1b": 1236,
    "llama3.2_3b": 3213,
    "llama3.3_70b": 70554,
    "ministral_8b": 8020,
    "mistral_7b": 7248,
    "mistral_small_24b": 23572,
    "olmo2_1b": 1485,
    "olmo2_7b": 7299,
    "phi4": 14660,
    "qwen3_0.6b": 596,
    "qwen3_1.7b": 1721,
    "qwen3_14b": 14768,
    "qwen3_32b": 32762,
    "qwen3_4b": 4022,
    "qwen3_8b": 8191,
    "smollm2_1.7b": 1711,
    "smollm2_360m": 362,
    "smollm3_3b": 3075,
    "tinyllama_1.1b": 1100,
}

# One recipe for each way that a model is built.
ARCHITECTURES = (
    "gemma3_1b_8gb",
    "llama3.2_1b_8gb",
    "mistral_7b_24gb",
    "olmo2_1b_8gb",
    "phi4_24gb",
    "qwen3_0.6b_8gb",
    "smollm3_3b_16gb",
)
each_recipe = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def model_of(path: Path) -> str:
    return path.stem.rpartition("_")[0]


def shape_of(path: Path) -> ModelShape:
    return ModelShape.from_config(public_config(model_of(path)))


def card_of(path: Path) -> tuple[int, int]:
    """Gigabytes of the card, and of the machine's memory where the recipe asks for it, else 0."""
    found = CARD.search(path.read_text(encoding="utf-8").partition("\n")[0])
    assert found is not None, "the first line says the card, and that it was not run"
    return int(found[1]), int(found[2] or 0)


def conversations(count: int) -> list[dict[str, object]]:
    return [
        {
            "messages": [
                {"role": "user", "content": f"Remind me at {number}"},
                {"role": "assistant", "content": f"At {number}, yes."},
            ]
        }
        for number in range(count)
    ]


def small(path: Path, folder: Path, *more: str) -> Recipe:
    """The recipe for a tiny base and few rows in ``folder``; what it promises is left as it is."""
    rows = "".join(json.dumps(row) + "\n" for row in conversations(24))
    (folder / "train.jsonl").write_text(rows, encoding="utf-8")
    return recipe_file.load(
        path,
        (
            f"base_model.path={folder / 'base'}",
            "base_model.name=null",
            "base_model.revision=null",
            f"data.train={folder / 'train.jsonl'}",
            "data.validation_rows=4",
            "data.test_rows=6",
            *more,
        ),
    )


def predictions(path: Path) -> dict[str, Footprint]:
    """What ``check`` predicts on a GPU where every row is as long as the window, and trained from its second token."""
    recipe, shape = recipe_file.load(path), shape_of(path)
    window = recipe.data.window
    row = EncodedRow((1,) * window, (IGNORE_INDEX, *[1] * (window - 1)), (1,), "", "")
    rows = dataset.TaskRows(
        train=(row,), validation=(row,), test=(row,) * 200, audit=None, stop_ids=(), pad_id=0, notes=(), tokenizer=None
    )
    return memory_predictions(recipe, shape, rows, training_load(recipe, rows.train, "cuda", cuts(recipe)[0]))


def test_every_model_that_people_look_for_has_a_recipe() -> None:
    assert {model_of(path) for path in PATHS} == set(PARAMETERS) == {path.stem for path in CONFIGS.glob("*.json")}
    assert {card_of(path)[0] for path in PATHS} == {8, 16, 24, 48, 80}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_config_has_the_size_that_the_model_card_tells(name: str) -> None:
    millions = ModelShape.from_config(public_config(name)).parameters / 1e6
    # Norms of q and k, and cards that round, are within half a per cent.
    assert millions == pytest.approx(PARAMETERS[name], rel=0.005)


@each_recipe
def test_a_recipe_names_the_model_that_its_config_is_of(path: Path) -> None:
    base = recipe_file.load(path).base_model
    name = public_config(model_of(path))["_name"]
    assert base.name == name or (base.path is not None and name in path.read_text(encoding="utf-8"))


@each_recipe
def test_a_recipe_fits_the_card_that_it_names(path: Path) -> None:
    card, memory = card_of(path)
    needed = {purpose: footprint.total for purpose, footprint in predictions(path).items()}
    # A tenth is left to the desktop and to what the allocator cannot fill.
    assert needed["training"] <= 0.9 * card * GIB
    assert needed["rounding"] <= 0.9 * card * GIB
    if memory:
        # A little earlier than it must be: the machine's memory is asked for where the card is nearly full.
        assert needed["evaluation"] > 0.8 * card * GIB, "no memory of the machine need be asked for"
        assert 2 * shape_of(path).parameters <= 0.9 * memory * 1e9
    else:
        assert needed["evaluation"] <= 0.9 * card * GIB


def test_the_text_part_of_gemma_3_is_made_as_its_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = (RECIPES / "gemma3_4b_16gb.yaml").read_text(encoding="utf-8").splitlines()
    code = "\n".join(line.removeprefix("  #   ") for line in lines if line.startswith("  #   "))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text = {**sizes, "model_type": "gemma3_text", "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 400}
    vision = {**sizes, "model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.generation_config.eos_token_id = [1, 106]
    monkeypatch.chdir(tmp_path)
    whole.save_pretrained("google/gemma-3-4b-it")
    write_tokenizer(Path("google/gemma-3-4b-it"), family_of("gemma3_4b"))
    exec(code, {})
    base = base_model.resolve(BaseModelSource(path="gemma-3-4b-it-text"))
    assert TextTokenizer.load(base.folder).stop_ids == (1, 106)
    token_ids = torch.arange(6, 14)[None]
    made = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    assert torch.equal(made(input_ids=token_ids).logits, whole(input_ids=token_ids).logits)


@each_recipe
def test_the_formats_of_a_recipe_hold_the_layers_of_its_model(path: Path) -> None:
    for name in recipe_file.load(path).export.formats:
        assert unfit_layers(name, shape_of(path).linears) == {}


@each_recipe
def test_a_recipe_trains_turn_and_stop_token_of_its_model(path: Path, tmp_path: Path) -> None:
    family = family_of(model_of(path))
    base = tmp_path / "base"
    base.mkdir()
    tokenizer = write_tokenizer(base, family)
    stops = [tokenizer.token_to_id(text) for text in family.stops]
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}), encoding="utf-8")
    rows = dataset.load_rows(small(path, tmp_path), base)
    assert rows.stop_ids == tuple(stops)
    assert rows.audit.stop_token_trained_share == 1
    row = rows.train[0]
    trained = [token for token, label in zip(row.token_ids, row.labels, strict=True) if label != IGNORE_INDEX]
    assert TextTokenizer.load(base).decode(trained, skip_special=False).endswith(family.turn_end)
    assert family.turn_end in path.read_text(encoding="utf-8"), "the recipe tells which token it is"


@pytest.mark.parametrize("stem", ARCHITECTURES)
def test_two_steps_of_every_architecture_give_every_file_that_its_recipe_promises(stem: str, tmp_path: Path) -> None:
    # One merge base, and one rung above the lowest: half the time of what the recipe asks for.
    two_steps_of(RECIPES / f"{stem}.yaml", tmp_path, "merge.into=dequantized")


@pytest.mark.slow
@each_recipe
def test_two_steps_of_every_recipe_give_every_file_that_it_promises(path: Path, tmp_path: Path) -> None:
    two_steps_of(path, tmp_path)


def two_steps_of(path: Path, folder: Path, *more: str) -> None:
    """Runs the recipe from its tiny base to the report and looks at what came of it."""
    stand_in(folder / "base", model_of(path))
    recipe = small(
        path,
        folder,
        f"run.folder={folder / 'runs'}",
        "run.threads=1",
        f"quantization.cache_folder={folder / 'quantized'}",
        "lora.rank=4",
        "training.max_steps=2",
        "training.epochs=null",
        "training.learning_rate=0.01",
        "evaluation.max_new_tokens=2",
        "evaluation.samples=1",
        "calibration.rows=4",
        "calibration.batch_size=4",
        # How good four bits are after two steps on a random model is not the question.
        "ladder.bar_int4=0.0",
        "ladder.last_rung=1",
        *more,
    )
    report = pipeline.run(recipe)
    assert report is not None
    assert [export.format for export in report.exports] == list(recipe.export.formats)
    for export in report.exports:
        at_hand = not missing_modules(export.format)
        assert export.verified is at_hand, export.verification
        assert at_hand or FACTS[export.format].runtime == "llama_cpp"
    nats = {stage.name: stage.nats_per_token for stage in report.stages}
    assert nats["adapter_unmerged"] < nats["quantized_base"]
    assert nats["merged_16bit"] == pytest.approx(nats["adapter_unmerged"], abs=0.1)
