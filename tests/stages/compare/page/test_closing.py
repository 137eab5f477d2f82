from dataclasses import replace

from qlora_trainer.pages.blocks import Code, Fold, Terms
from qlora_trainer.pages.wording import METRIC_TITLES
from qlora_trainer.stages.compare.page.closing import GLOSSARY, environment, settings
from qlora_trainer.stages.compare.page.methods import methods_table
from tests.stages.compare.compared import COMPARISON


def test_every_heading_of_the_table_and_every_metric_is_explained() -> None:
    terms = " ".join(term for term, _ in GLOSSARY).lower()
    headings = {column.title.split(", nats")[0].lower() for column in methods_table(COMPARISON).columns}
    explained = {heading.removesuffix(" tokens/s") for heading in headings - {"method"}}
    assert {heading for heading in explained if heading not in terms} == set()
    assert [title for title in METRIC_TITLES.values() if title.lower() not in terms] == []


def test_settings_stand_as_the_recipe_has_them() -> None:
    (terms,) = (block for block in settings(COMPARISON).blocks if isinstance(block, Terms))
    assert dict(terms.pairs) == {
        "model": "trained",
        "methods": "[gptq_int4, rtn_int4]",
        "group_size": "64",
        "most_added_nats": "0.02",
        "most_mib": "absent",
        "allow_16bit_layers": "true",
    }


def test_the_command_and_the_resolved_recipe_are_there_to_copy() -> None:
    section = settings(COMPARISON)
    assert [block.text for block in section.blocks if isinstance(block, Code)] == [COMPARISON.command]
    (fold,) = (block for block in section.blocks if isinstance(block, Fold))
    assert fold.blocks == (Code("recipe.yaml of the run folder", "run: {name: tiny}\n", "yaml"),)


def test_what_was_not_kept_is_left_out() -> None:
    old = replace(COMPARISON, settings={}, recipe_text="", environment={}, command="")
    assert (settings(old).blocks, environment(old).blocks) == ((), ())
