"""The ladder: a file is made, measured on the validation rows, and made better until it is good enough.

Validation rows choose the rung and the merge base; the test rows choose nothing and are looked at once, by the file
that ships.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qlora_trainer.export_formats import FACTS, MergeBase, bar_of, rungs_of, start_rung
from qlora_trainer.pipeline.ledger import Ledger
from qlora_trainer.pipeline.measuring import MeasuredExport, Measuring, ValidationReferences
from qlora_trainer.recipe import ExportFormat, Recipe
from qlora_trainer.records import Attempt
from qlora_trainer.runtime.run_folder import RunFolder, fingerprint
from qlora_trainer.stages import export
from qlora_trainer.stages.evaluate import Teacher
from qlora_trainer.stages.export import ExportInputs, Shelf, Way, WrittenExport


@dataclass(frozen=True)
class Tried:
    """An attempt and its file set."""

    attempt: Attempt
    written: WrittenExport


class Climbing:
    """Makes the files of one run.

    Args:
        recipe: bars, rungs, formats.
        measuring: the bench.
        folder: of the run.
        ledger: keeps each attempt, so that an interrupted export goes on.
        inputs: what files are made from.
        bases: which bases the delta may go into.
        key: of everything that the trained adapter depends on.
        references: the quantized base and the trained model on the validation rows.
    """

    def __init__(
        self,
        recipe: Recipe,
        measuring: Measuring,
        *,
        folder: RunFolder,
        ledger: Ledger,
        inputs: ExportInputs,
        bases: tuple[MergeBase, ...],
        key: str,
        references: ValidationReferences,
    ) -> None:
        self.recipe, self.measuring, self.folder, self.ledger = recipe, measuring, folder, ledger
        self.inputs, self.bases, self.references = inputs, bases, references
        rounding = (recipe.calibration.model_dump(mode="json"), recipe.rounding.model_dump(mode="json"))
        self.key = fingerprint(key, rounding, recipe.merge.data_type, recipe.export.allow_16bit_layers)
        self.workplace = folder.exports / ".work" / self.key[:16]

    def file(self, name: ExportFormat, teacher: Teacher) -> MeasuredExport:
        """One file: climbed for, shipped, verified in its runtime and measured on the test rows.

        Args:
            name: the format.
            teacher: the trained model on the test rows.
        """
        ladder = self.recipe.ladder.model_dump(mode="json")
        key = fingerprint(self.key, name, self.bases, ladder, self.measuring.ground.bench_key)

        def carry_out() -> MeasuredExport:
            inputs = self.inputs
            if FACTS[name].kind in ("adapter", "16bit"):
                written = export.write(name, self.folder.exports / name, inputs, into=inputs.merged_into)
                return self.measuring.export(written, inputs, teacher=teacher, rung=0)
            tried, why_ended = self._climb(name, inputs)
            best = _best(tried)
            shipped = self._ship(name, best, inputs, tried)
            measured = self.measuring.export(shipped, inputs, teacher=teacher, rung=best.attempt.rung)
            attempts = tuple(replace(each.attempt, is_shipped=each is best) for each in tried)
            exported = replace(measured.exported, attempts=attempts, why_ended=why_ended)
            return replace(measured, exported=exported)

        return self.measuring.kept_export(name, key, carry_out)

    def tidy(self) -> None:
        """Removes what was only needed on the way."""
        shutil.rmtree(self.folder.exports / ".work", ignore_errors=True)

    def _climb(self, name: ExportFormat, inputs: ExportInputs) -> tuple[list[Tried], str]:
        """All attempts, and why there was no further one."""
        ladder = self.recipe.ladder
        rungs = rungs_of(name, ladder, has_magnitudes=inputs.factors.has_magnitudes)
        tried: list[Tried] = []
        for rung in rungs:
            spent = sum(each.attempt.seconds for each in tried) / 60
            if tried and ladder.minutes is not None and spent >= ladder.minutes:
                return tried, f"the {ladder.minutes:g} minutes of ladder.minutes are spent"
            tried += [self._try(name, way, inputs, tried) for way in self._ways(rung, tried)]
            best = _best(tried)
            for beaten in tried:
                if beaten is not best:
                    shutil.rmtree(beaten.written.folder, ignore_errors=True)
            if best.attempt.meets_bar and rung >= min(start_rung(name, ladder), rungs[-1]):
                return tried, f"rung {best.attempt.rung} meets the bar"
        if bar_of(name, ladder) is None or len(rungs) == 1:
            return tried, "this format has no further rung"
        return tried, "no rung is left: ladder.last_rung and the format allow no more"

    def _ways(self, rung: int, tried: list[Tried]) -> Iterator[Way]:
        """What is tried on a rung: each base; off the grid only for rung 4; the best file so far for rung 5."""
        if rung == 4:
            yield Way(rung, "original" if "original" in self.bases else self.bases[0])
        elif rung == 5:
            best = _best(tried)
            assert best.written.merged_into is not None
            yield Way(rung, best.written.merged_into)
        else:
            yield from (Way(rung, into) for into in self.bases)

    def _try(self, name: ExportFormat, way: Way, inputs: ExportInputs, tried: list[Tried]) -> Tried:
        """One attempt, made now or read back."""
        stage = f"export {name} rung {way.rung} {way.into}"
        folder = self.workplace / f"{name}-rung-{way.rung}-{way.into}"
        source = _source_rung(way.rung, tried)

        def carry_out() -> Tried:
            began = time.monotonic()
            written = self._make(name, way, inputs, folder, source_rung=source)
            opened = export.open_in_runtime(written, inputs)
            standing, fidelity = self.measuring.standing(
                opened.model, self.references, bar_of(name, self.recipe.ladder)
            )
            attempt = Attempt(
                rung=way.rung,
                method=export.method_in_words(way.rung, name, self.recipe.rounding),
                merged_into=way.into,
                nats_per_token=standing.nats_per_token,
                gain_kept=standing.gain_kept,
                interval=standing.interval,
                kl_to_trained=fidelity.kl_to_trained,
                top1_agreement=fidelity.top1_agreement,
                bytes=sum(path.stat().st_size for path in written.folder.rglob("*") if path.is_file()),
                seconds=time.monotonic() - began,
                meets_bar=standing.meets_bar,
            )
            return Tried(attempt, written)

        key = fingerprint(self.key, name, way.rung, way.into, source, self.measuring.ground.bench_key, self._bars())
        return self.ledger.once(stage, key, Tried, make=carry_out, describe=_in_words)

    def _bars(self) -> tuple[float, ...]:
        ladder = self.recipe.ladder
        return ladder.bar_int4, ladder.bar_int8, ladder.max_kl, ladder.max_loss_difference

    def _make(
        self, name: ExportFormat, way: Way, inputs: ExportInputs, folder: Path, *, source_rung: int | None
    ) -> WrittenExport:
        # Rounding knows only the layers that the format holds; writing lists the others.
        shelf = Shelf(self.workplace / "rounded", replace(inputs, layers=export.layers_of(name, inputs.layers)))
        if FACTS[name].kind != "integer":
            return export.write(name, folder, inputs, into=way.into)
        spec = export.integer_format_of(name).spec
        if source_rung is None:
            return export.write(name, folder, inputs, into=way.into, rounded=shelf.rounded(way, spec))
        source = Way(source_rung, way.into)
        return export.write(
            name,
            folder,
            inputs,
            into=way.into,
            rounded=shelf.rounded(source, spec),
            raised=shelf.worst_layers(source, spec),
        )

    def _ship(self, name: ExportFormat, best: Tried, inputs: ExportInputs, tried: list[Tried]) -> WrittenExport:
        """Moves the chosen file set to its place."""
        written = best.written
        if not written.folder.exists():
            # Interrupted after it was beaten or moved, and read back from its record now.
            assert written.merged_into is not None
            way = Way(best.attempt.rung, written.merged_into)
            source = _source_rung(way.rung, [each for each in tried if each.attempt.rung < way.rung])
            written = self._make(name, way, inputs, written.folder, source_rung=source)
        target = self.folder.exports / name
        if target.exists():
            shutil.rmtree(target)
        written.folder.rename(target)
        return replace(written, folder=target)


def _best(tried: list[Tried]) -> Tried:
    return min(tried, key=lambda each: each.attempt.nats_per_token)


def _source_rung(rung: int, before: list[Tried]) -> int | None:
    """The rung whose rounding rung 5 starts from: what was best before it; None for the others."""
    return _best(before).attempt.rung if rung == 5 else None


def _in_words(tried: Tried) -> str:
    attempt = tried.attempt
    kept = "" if attempt.gain_kept is None else f", keeps {100 * attempt.gain_kept:.1f} %"
    return f"validation {attempt.nats_per_token:.4f} nats/token{kept}, KL {attempt.kl_to_trained:.2g}"
