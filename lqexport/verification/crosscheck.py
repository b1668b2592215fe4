"""A written file decoded by the CUDA kernels too: verification compares each tensor's values with NumPy's, bit by bit.
Where the kernels cannot run, it says why."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from lqexport.kernels import cuda, cuda_decode
from lqexport.storage.artifact import StoredTensor


class CrossCheck:
    """Counts the tensors that the kernels decoded, and names those that they decoded to other values than NumPy."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.compared = 0
        self.different: list[str] = []

    def add(self, tensor: StoredTensor, values: NDArray[np.float32]) -> None:
        """Compare the kernels' values of a tensor with those of `formats`, bit by bit, a NaN equal to any other."""
        if not (cuda_decode.decodes(tensor.codec_name) and cuda.usable(self.device)):
            return
        self.compared += 1
        ours = decoded_on(tensor, self.device).cpu().numpy()
        if not np.all((ours.view(np.uint32) == values.view(np.uint32)) | (np.isnan(ours) & np.isnan(values))):
            self.different.append(tensor.name)

    def sentence(self, total: int) -> str:
        """By which path the file's tensors were decoded."""
        if self.compared:
            same = self.compared - len(self.different)
            return f"NumPy and the CUDA kernels, the same bits in {same} of {total} tensors"
        if self.device.type != "cuda":
            return "NumPy"
        reason = cuda.missing() or "The CUDA kernels know none of the file's formats."
        return f"NumPy alone. {reason}"


def decoded_on(tensor: StoredTensor, device: torch.device) -> torch.Tensor:
    """A stored tensor's values by the kernels, float32 in its own shape, on the device."""
    planes = {name: torch.from_numpy(np.array(plane)).to(device) for name, plane in tensor.planes.items()}
    return cuda_decode.decode(tensor.codec_name, planes, tensor.shape[-1]).reshape(tensor.shape)
