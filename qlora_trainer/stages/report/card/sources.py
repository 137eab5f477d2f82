"""Where rows came from, as a card may tell it: names of files and hub data sets, never a path of this machine."""

from pathlib import Path

from qlora_trainer.recipe import Sources, sources_of


def source_names(side: Sources) -> str:
    """``train.jsonl, owner/name@revision``: the sources of one side by their names."""
    return ", ".join(source.hub or Path(source.path or "").name for source in sources_of(side))


def local_paths(side: Sources) -> tuple[str, ...]:
    """Paths on this machine among the sources of one side."""
    return tuple(source.path for source in sources_of(side) if source.path is not None)
