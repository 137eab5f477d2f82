"""The rungs: how a format's integers are chosen, from rounding to nearest up to more bits for the worst layers.

Each rung leaves a ``RoundedModel`` on a shelf in the run's folder, so that formats with the same grids share it and an
interrupted export does not repeat it.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from qlora_trainer.errors import RecipeError
from qlora_trainer.export_formats import FACTS, MergeBase
from qlora_trainer.numerics.integer_weight import GridSpec, IntegerWeight, round_to_nearest
from qlora_trainer.recipe import ExportFormat, Rounding
from qlora_trainer.runtime.atomic import write_text, writing_folder
from qlora_trainer.stages.export.aware import aware_matrices
from qlora_trainer.stages.export.blockwise import Bench, round_blocks
from qlora_trainer.stages.export.inputs import ExportInputs
from qlora_trainer.stages.export.layerwise import gptq_method
from qlora_trainer.stages.export.learned import learned_method
from qlora_trainer.stages.export.raising import worst_layers
from qlora_trainer.stages.export.rounded import OUTSIDE, RoundedModel
from qlora_trainer.stages.export.scaling import awq_method
from qlora_trainer.stages.export.tuning import ScaleTuning


@dataclass(frozen=True)
class Way:
    """One way to make a file.

    Attributes:
        rung: 0 to 5.
        into: base of the merged weights.
    """

    rung: int
    into: MergeBase


Kind = Literal["layerwise", "learned", "aware"]
"""How integers are chosen: rung 1, 3 or 4 without the tuning of scales."""


def method_in_words(rung: int, name: ExportFormat, rounding: Rounding) -> str:
    """What a rung does, in a few words."""
    if FACTS[name].kind == "library":
        return f"rounded by {'llama.cpp' if name.startswith('gguf_') else 'bitsandbytes'}"
    layerwise = rounding.method.upper()
    return {
        0: "round to nearest",
        1: layerwise,
        2: f"{layerwise} + tuned scales",
        3: "learned rounding + tuned scales",
        4: "quantization-aware merging + tuned scales",
        5: "more bits for the worst layers",
    }[rung]


class Shelf:
    """Rounded models of one run, made when they are asked for.

    Args:
        folder: where they lie; names in it say rung, base and grid, so it must belong to one adapter and one choice of
            calibration and rounding settings.
        inputs: what they are made from.
    """

    def __init__(self, folder: Path, inputs: ExportInputs) -> None:
        self.folder, self.inputs = folder, inputs

    def rounded(self, way: Way, spec: GridSpec) -> RoundedModel | None:
        """The rounded matrices of a way to make a file; None for rung 0, where the format rounds by itself.

        Raises:
            RecipeError: there are fewer calibration rows than asked for, or a layer cannot be rounded.
        """
        if way.rung == 0:
            return None
        if way.rung == 1:
            return self.kept(way, spec, "layerwise")
        sources: dict[int, Kind] = {2: "layerwise", 3: "learned", 4: "aware"}
        source = sources[way.rung]
        return self._tuned(way, spec, source)

    def worst_layers(self, way: Way, spec: GridSpec) -> frozenset[str]:
        """Modules that get 8 bits on rung 5, for the file that was made in this way; kept beside the rounded models."""
        file = self._place(way.into, spec, f"worst-of-rung-{way.rung}").with_suffix(".json")
        if not file.exists():
            worst = worst_layers(self._bench(), way.into, spec, self.rounded(way, spec))
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text(file, json.dumps(worst))
        return frozenset(json.loads(file.read_text(encoding="utf-8")))

    def kept(self, way: Way, spec: GridSpec, kind: Kind) -> RoundedModel:
        """The rounded matrices of a kind before their scales are tuned, made where they are not on the shelf.

        Raises:
            RecipeError: there are fewer calibration rows than asked for, or a layer cannot be rounded.
        """
        folder = self._place(way.into, spec, kind)
        if not folder.exists():
            with writing_folder(folder) as partial:
                try:
                    self._make(kind, way.into, spec, RoundedModel(partial))
                except ValueError as error:
                    raise RecipeError(f"export: {error}") from error
        return RoundedModel(folder)

    def _make(self, kind: Kind, into: MergeBase, spec: GridSpec, target: RoundedModel) -> None:
        rounding = self.inputs.rounding
        if kind == "aware":
            self._make_aware(into, spec, target)
            return
        if kind == "learned":
            method = learned_method(spec, rounding, seed=self.inputs.data.seed)
        else:
            method = {"gptq": gptq_method, "awq": awq_method}[rounding.method](spec, rounding)
        round_blocks(self._bench(), into, spec, method, target)

    def _make_aware(self, into: MergeBase, spec: GridSpec, target: RoundedModel) -> None:
        bench = self._bench()
        missing = {name: set(bench.linears_of(name)) for name in bench.model.block_names}
        missing[OUTSIDE] = set(bench.linears_of(None))
        blocks: dict[str, dict[str, IntegerWeight]] = {}
        for module, matrix in aware_matrices(self.inputs, into, spec, self.inputs.rounding):
            block = bench.model.block_of(f"{module}.weight") or OUTSIDE
            blocks.setdefault(block, {})[module] = round_to_nearest(matrix.cpu(), spec)
            missing[block].remove(module)
            if not missing[block]:
                target.write_block(block, blocks.pop(block))

    def _tuned(self, way: Way, spec: GridSpec, kind: Kind) -> RoundedModel:
        folder = self._place(way.into, spec, f"{kind}-tuned")
        if not folder.exists():
            source = self.kept(way, spec, kind)
            with TemporaryDirectory(dir=self.folder) as at_work:
                tuning = ScaleTuning(self._bench(), way.into, spec, source, Path(at_work))
                tuning.run(self.inputs.rounding)
                with writing_folder(folder) as partial:
                    tuning.write(RoundedModel(partial))
        return RoundedModel(folder)

    def _bench(self) -> Bench:
        self.folder.mkdir(parents=True, exist_ok=True)
        return Bench(self.inputs, self.folder)

    def _place(self, into: MergeBase, spec: GridSpec, kind: str) -> Path:
        scale = str(spec.scale_dtype).removeprefix("torch.")
        return self.folder / f"int{spec.bits}-{spec.granularity}-{spec.offset}-{scale}-{into}-{kind}"
