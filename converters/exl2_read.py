"""Reading a folder of ExLlamaV2."""

from __future__ import annotations

import numpy as np

from lqexport.converters.folder_model import FolderModel
from lqexport.formats.codec import Planes
from lqexport.formats.exl2 import of_planes

PLANES = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")


class Exl2Model(FolderModel):
    """An EXL2 model; a tensor's codec follows from the table of its groups."""

    container, reader = "ExLlamaV2 folder", "ExLlamaV2"
    parts = (*PLANES, "q_perm")

    def packed_shape(self, key: str) -> tuple[int, int]:
        return self.stored.shape(f"{key}.q_weight")[-1], self.stored.shape(f"{key}.q_invperm")[0]

    def packed_codec(self, key: str) -> str:
        lines = np.empty((self.stored.shape(f"{key}.q_weight")[0], 0))  # only how many there are is asked
        return of_planes({"q_groups": self.stored[f"{key}.q_groups"], "q_weight": lines}).name

    def packed_planes(self, key: str) -> Planes:
        return {plane: self.stored[f"{key}.{plane}"] for plane in PLANES}
