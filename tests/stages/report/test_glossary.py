from qlora_trainer.pages.wording import METRIC_TITLES
from qlora_trainer.records import RunReport
from qlora_trainer.stages.report.glossary import GLOSSARY
from qlora_trainer.stages.report.tables import exports_table, gap_table

SELF_EXPLAINING = {"Stage", "Format", "Bits", "Size", "Runtime", "Status", "Made by"}


def test_every_heading_of_the_main_tables_is_explained(report: RunReport) -> None:
    terms = " ".join(term for term, _ in GLOSSARY).lower()
    headings = {column.title for table in (gap_table(report), exports_table(report)) for column in table.columns}
    figures = {heading.split(", nats")[0].lower() for heading in headings - SELF_EXPLAINING}
    assert {figure for figure in figures if figure not in terms} == set()


def test_every_metric_is_explained() -> None:
    terms = " ".join(term for term, _ in GLOSSARY).lower()
    assert [title for title in METRIC_TITLES.values() if title.lower() not in terms] == []


def test_the_words_of_the_ladder_are_explained() -> None:
    terms = {term for term, _ in GLOSSARY}
    wanted = {"Rung", "GPTQ", "Tuned scales", "Learned rounding", "Dead zone", "Bar", "Merge base", "KL to trained"}
    assert wanted <= terms
    (rungs,) = (meaning for term, meaning in GLOSSARY if term == "Rung")
    assert all(f"{rung} " in rungs for rung in range(6))
