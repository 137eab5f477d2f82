"""Rounded matrices on disk, a decoder block at a time: what a method leaves and a format packs.

A folder holds two files for each block: integers, and their grids. Grids have a file of their own because tuning
changes nothing else: a tuned model shares the integers of the one it came from.
"""

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlora_trainer.numerics.affine import Grid
from qlora_trainer.numerics.integer_weight import IntegerWeight
from qlora_trainer.runtime.weight_files import read_file, write_tensors
from qlora_trainer.runtime.weight_headers import read_header

OUTSIDE = "outside"
"""Name of the group of matrices that stand in no decoder block."""


@dataclass(frozen=True)
class RoundedModel:
    """A model's rounded matrices in a folder.

    Attributes:
        folder: holds ``<block>.codes.safetensors`` and ``<block>.grids.safetensors``; where a method moved part of a
            matrix into its neighbours, these in ``<block>.plain.safetensors`` and the factors in
            ``<block>.scaling.safetensors``.
    """

    folder: Path

    def blocks(self) -> list[str]:
        """Names of the blocks that are there."""
        return sorted(file.name.removesuffix(".codes.safetensors") for file in self.folder.glob("*.codes.safetensors"))

    def block(self, name: str) -> dict[str, IntegerWeight]:
        """The matrices of one block by module; none where the block has no file."""
        file = self._file(name, "codes")
        if not file.exists():
            return {}
        grids = read_file(self._file(name, "grids"))
        return {
            key.removesuffix(".codes"): IntegerWeight(codes, _grid(grids, key.removesuffix(".codes")))
            for key, codes in read_file(file).items()
        }

    def places(self) -> dict[str, str]:
        """The block of each rounded module."""
        return {
            key.removesuffix(".codes"): name for name in self.blocks() for key in read_header(self._file(name, "codes"))
        }

    def plain(self, name: str) -> dict[str, Tensor]:
        """Tensors of one block that stand in for those of the merged model, by checkpoint name."""
        file = self._file(name, "plain")
        return read_file(file) if file.exists() else {}

    def matrices(self) -> Iterator[tuple[str, IntegerWeight]]:
        """Every matrix by module, one block in memory at a time."""
        for name in self.blocks():
            yield from self.block(name).items()

    def integers_in(
        self, weights: Iterable[tuple[str, Tensor]], *, but: Collection[str] = ()
    ) -> Iterator[tuple[str, Tensor | IntegerWeight]]:
        """A model's weights by checkpoint name, in their order, the rounded matrices in place of its own.

        Args:
            weights: taken one at a time.
            but: modules whose own matrix stays.
        """
        places = {module: block for module, block in self.places().items() if module not in but}
        plain = {name: tensor for block in self.blocks() for name, tensor in self.plain(block).items()}
        held, matrices = "", dict[str, IntegerWeight]()
        for name, tensor in weights:
            block = places.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
            if block is None:
                yield name, plain.get(name, tensor)
                continue
            if block != held:
                held, matrices = block, self.block(block)
            yield name, matrices[name.removesuffix(".weight")]

    def dequantized_in(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """As ``integers_in``, with the reals of the rounded matrices."""
        for name, weight in self.integers_in(weights):
            yield name, weight if isinstance(weight, Tensor) else weight.dequantized()

    def unscaled(self, block: str, module: str, matrix: Tensor) -> Tensor:
        """A matrix of this model as it would be had its rows and columns not been scaled before rounding."""
        file = self._file(block, "scaling")
        factors = read_file(file) if file.exists() else {}
        if f"{module}.columns" in factors:
            matrix = matrix / factors[f"{module}.columns"]
        if f"{module}.rows" in factors:
            matrix = matrix * factors[f"{module}.rows"].unsqueeze(1)
        return matrix

    def write_block(
        self,
        name: str,
        matrices: Mapping[str, IntegerWeight],
        *,
        plain: Mapping[str, Tensor] | None = None,
        columns: Mapping[str, Tensor] | None = None,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Adds one block; arguments as in ``blockwise.RoundedBlock``."""
        codes: dict[str, Tensor] = {}
        for module, weight in matrices.items():
            codes[f"{module}.codes"] = weight.codes
        if codes:
            write_tensors(self._file(name, "codes"), codes)
            self.write_grids(name, {module: weight.grid for module, weight in matrices.items()})
        if plain:
            write_tensors(self._file(name, "plain"), plain)
        scaling = {f"{module}.columns": factors for module, factors in (columns or {}).items()}
        scaling |= {f"{module}.rows": factors for module, factors in (rows or {}).items()}
        if scaling:
            # One factor may stand for several matrices, and a file holds no tensor twice.
            write_tensors(self._file(name, "scaling"), {key: factors.clone() for key, factors in scaling.items()})

    def write_grids(self, name: str, grids: Mapping[str, Grid]) -> None:
        """Gives one block new grids."""
        tensors: dict[str, Tensor] = {}
        for module, grid in grids.items():
            tensors[f"{module}.scale"], tensors[f"{module}.zero_point"] = grid.scale, grid.zero_point
            tensors[f"{module}.bits"] = torch.tensor(grid.bits)
        write_tensors(self._file(name, "grids"), tensors)

    def share_integers_with(self, target: "RoundedModel") -> None:
        """Puts this model's integers into another folder without copying them, where the disk can."""
        for file in self.folder.glob("*.safetensors"):
            if file.name.endswith(".grids.safetensors"):
                continue
            link = target.folder / file.name
            try:
                os.link(file, link)
            except OSError:
                link.write_bytes(file.read_bytes())

    def _file(self, name: str, kind: str) -> Path:
        return self.folder / f"{name}.{kind}.safetensors"


def _grid(tensors: Mapping[str, Tensor], module: str) -> Grid:
    return Grid(tensors[f"{module}.scale"], tensors[f"{module}.zero_point"], int(tensors[f"{module}.bits"]))
