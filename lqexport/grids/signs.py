"""Signs of a linear's inputs and outputs for which its rotated weights are spread evenly.

A rotation by a Hadamard matrix of 128 makes weights nearly Gaussian, if the rows that it adds up have little in common.
Where they have much in common, as the rows of an embedding or the inputs of a first block, some rotated rows have
several times the energy of others. A search of walks then loses up to 6 per cent more at 2 bits, 30 at 4 bits, and
several times as much at 6 bits, where large weights lie beyond the codebook. Signs decide how much is common.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_GAIN = 1e-6
"""A sign is flipped if that lowers what is uneven by more than this part of what was uneven at first."""


def even_signs(rows: Tensor, hadamard: Tensor) -> Tensor:
    """Returns the signs +1 and -1 [n, m] of rows for which the rows of each rotated run have nearly the same energy.

    rows       float32 [n, m, columns], n runs of m rows
    hadamard   [m, m], entries of one magnitude

    With G the inner products of a run's rows and s their signs, rotated row k has the energy
    sum_ij s_i s_j h_ki h_kj G_ij, up to a factor. What it differs from the mean of all rows is the sum over the pairs
    of different rows. The sum of its squares over k is made less by one flipped sign at a time, the one that gains
    most, until none gains.
    """
    products = rows @ rows.transpose(1, 2)
    products.diagonal(dim1=1, dim2=2).zero_()
    entries, signs, run = hadamard.sign(), torch.ones_like(rows[:, :, 0]), torch.arange(len(rows), device=rows.device)
    sums = products @ entries  # [n, i, k]: over j, s_i s_j G_ij h_jk
    uneven = (entries * sums).sum(1)
    least = LEAST_GAIN * uneven.square().sum(1)
    for _ in range(rows.shape[1]):
        changes = -4 * entries * sums  # of what is uneven, by the row whose sign is flipped
        best, row = (changes * (2 * uneven[:, None] + changes)).sum(2).min(1)
        flips = (best < -least).float()
        if not flips.any():
            break
        uneven = uneven + flips[:, None] * changes[run, row]
        sums = sums - 2 * flips[:, None, None] * products[run, row][:, :, None] * entries[row][:, None]
        sums[run, row] *= (1 - 2 * flips)[:, None]
        flipped = torch.ones_like(signs)
        flipped[run, row] = 1 - 2 * flips
        products = products * flipped[:, :, None] * flipped[:, None]
        signs = signs * flipped
    return signs
