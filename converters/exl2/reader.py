"""Reads a folder for ExLlamaV2."""

from __future__ import annotations

import functools

import numpy as np

from lqexport.converters.exl2.names import naming
from lqexport.converters.folders.folder_model import FolderModel
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.exl2 import of_planes

CUT, SHARED = ("q_weight", "q_scale"), ("q_scale_max", "q_groups", "q_invperm")
"""The planes that differ between the linears of a fused linear, and the planes that are equal in all of them."""
PLANES = (*CUT, *SHARED)


class Exl2Model(FolderModel):
    """A model in an EXL2 folder. A tensor's codec follows from the table of its groups."""

    container, reader = "ExLlamaV2 folder", "ExLlamaV2"
    parts = (*PLANES, "q_perm")

    @functools.cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.config)

    def stored_names(self, name: str) -> list[str]:
        return naming(self._architecture).stored_names(self._architecture, name)

    def joined(self, pieces: list[Planes]) -> Planes:
        shared = [[piece[plane].tobytes() for plane in SHARED] for piece in pieces]
        if any(planes != shared[0] for planes in shared):
            raise UserError(
                f"{self.folder} holds parts of a fused linear that are stored differently: not by lqexport."
            )
        return pieces[0] | {plane: np.concatenate([piece[plane] for piece in pieces], axis=1) for plane in CUT}

    def packed_shape(self, key: str) -> tuple[int, int]:
        return self.stored.shape(f"{key}.q_weight")[-1], self.stored.shape(f"{key}.q_invperm")[0]

    def packed_codec(self, key: str) -> str:
        lines = np.empty((self.stored.shape(f"{key}.q_weight")[0], 0))  # only the number of lines is used
        return of_planes({"q_groups": self.stored[f"{key}.q_groups"], "q_weight": lines}).name

    def packed_planes(self, key: str) -> Planes:
        return {plane: self.stored[f"{key}.{plane}"] for plane in PLANES}
