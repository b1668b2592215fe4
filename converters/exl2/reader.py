"""Reading a folder of ExLlamaV2."""

from __future__ import annotations

import functools

import numpy as np

from lqexport.converters.exl2.names import stored_names
from lqexport.converters.folders.folder_model import FolderModel
from lqexport.converters.models.architecture import Architecture
from lqexport.converters.models.architectures import architecture_of
from lqexport.errors import UserError
from lqexport.formats.codec import Planes
from lqexport.formats.exl2 import of_planes

CUT, SHARED = ("q_weight", "q_scale"), ("q_scale_max", "q_groups", "q_invperm")
"""Planes that each part of a fused linear has for itself, and those that all have alike."""
PLANES = (*CUT, *SHARED)


class Exl2Model(FolderModel):
    """An EXL2 model; a tensor's codec follows from the table of its groups."""

    container, reader = "ExLlamaV2 folder", "ExLlamaV2"
    parts = (*PLANES, "q_perm")

    @functools.cached_property
    def _architecture(self) -> Architecture:
        return architecture_of(self.config)

    def stored_names(self, name: str) -> list[str]:
        return stored_names(self._architecture, name)

    def joined(self, parts: list[Planes]) -> Planes:
        shared = [[part[plane].tobytes() for plane in SHARED] for part in parts]
        if any(other != shared[0] for other in shared):
            raise UserError(
                f"{self.folder} holds parts of a fused linear that are stored differently: not by lqexport."
            )
        return parts[0] | {plane: np.concatenate([part[plane] for part in parts], axis=1) for plane in CUT}

    def packed_shape(self, key: str) -> tuple[int, int]:
        return self.stored.shape(f"{key}.q_weight")[-1], self.stored.shape(f"{key}.q_invperm")[0]

    def packed_codec(self, key: str) -> str:
        lines = np.empty((self.stored.shape(f"{key}.q_weight")[0], 0))  # only how many there are is asked
        return of_planes({"q_groups": self.stored[f"{key}.q_groups"], "q_weight": lines}).name

    def packed_planes(self, key: str) -> Planes:
        return {plane: self.stored[f"{key}.{plane}"] for plane in PLANES}
