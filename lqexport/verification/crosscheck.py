"""Decodes a written file by the CUDA kernels too, and compares each tensor's values with NumPy's, bit by bit.

Where the kernels cannot run, the report says why.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.kernels import cuda, cuda_decode
from lqexport.storage.artifact import StoredTensor


class CrossCheck:
    """Compares tensors decoded by the CUDA kernels with the values that NumPy decodes.

    compared    number of tensors that the kernels have decoded
    different   names of the tensors that the kernels decoded to other values
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.compared = 0
        self.different: list[str] = []

    def add(self, tensor: StoredTensor, values: NDArray[np.float32]) -> None:
        """Compares the kernels' values of a tensor with `values`, which `formats` decoded, bit by bit. Any two NaNs are
        equal. Does nothing where the kernels cannot decode the tensor."""
        if not (cuda_decode.decodes(tensor.codec_name) and cuda.usable(self.device)):
            return
        self.compared += 1
        decoded = cuda_decode.decode_arrays(tensor.codec_name, tensor.planes, tensor.shape[-1], self.device)
        ours = decoded.cpu().numpy().reshape(tensor.shape)
        if not np.all((ours.view(np.uint32) == values.view(np.uint32)) | (np.isnan(ours) & np.isnan(values))):
            self.different.append(tensor.name)

    def sentence(self, total: int) -> str:
        """Returns the sentence that says by which path the `total` tensors of the file were decoded."""
        if self.compared:
            same = self.compared - len(self.different)
            return f"NumPy and the CUDA kernels, the same bits in {same} of {total} tensors"
        if self.device.type != "cuda":
            return "NumPy"
        reason = cuda.missing() or "The CUDA kernels know none of the file's formats."
        return f"NumPy alone. {reason}"
