"""Sums up the second moments of a linear's inputs: the Hessian H of its squared output error."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import Moments
from lqexport.runtime import products
from lqexport.runtime.placement import Keep, in_place
from lqexport.runtime.processes import ALONE, Processes

Group = tuple[str, ...]
"""The names of the linears in a block that share their second moments."""
PANELS = 8
"""Panels of columns of a symmetric matrix. Only what is on and below the diagonal is summed: 0.56 of the products."""


def add_products(lower: Tensor, x: Tensor) -> None:
    """Adds x^T x to a matrix [C, C], on and below the diagonal alone, for float32 x [tokens, C]."""
    columns = x.shape[1]
    lines = x.T.contiguous() if products.has_fast_products() else x.T
    for start in range(0, columns, width := -(-columns // PANELS)):
        panel = slice(start, start + width)
        products.add_times_transposed(lower[start:, panel], lines[start:], lines[panel])


def mirror(matrices: Tensor) -> Tensor:
    """Overwrites what is above the diagonal of matrices [..., C, C] by what is below it, and returns them."""
    for start in range(0, columns := matrices.shape[-1], width := -(-columns // PANELS)):
        end = start + width
        corner = matrices[..., start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).mT)
        matrices[..., start:end, end:] = matrices[..., end:, start:end].mT
    return matrices


class SecondMoments:
    """The second moments H of a linear's inputs: the sum over tokens t of s_t x_t x_t^T, over the number of tokens.

    The weight s_t of a token depends on `moments_type`:

    plain        1
    normalized   1 / |x_t|^2. Otherwise a few tokens with massive activations (the first of a sequence, separators) rule
                 H, and the solver spends its freedom on outputs that the end loss does not depend on
    guided       the mean over the outputs j of (d loss / d z_tj)^2, to the power `power`. z = W x are the outputs, and
                 the loss is the summed cross-entropy (GuidedQuant: Kim et al. 2025, eq. 7). There is one H for each of
                 `output_groups` equal runs of outputs. At the power 1, half of d H d^T, summed over rows, estimates
                 what the error d of the weights costs the model, in nats per token. At lower powers fewer tokens rule
                 H, and it fits other text better. H is then scaled to the trace that it has at the power 1, so it still
                 estimates nats

    Tokens may come in shards. Each shard is summed by itself, and the sums are added in the order of the shards, so the
    bits do not depend on which process had which shard. `keep` puts the total where it stays: the only operation on it
    is addition, which gives the same bits on every device.
    """

    def __init__(
        self, columns: int, moments_type: Moments, device: torch.device, output_groups: int = 1, keep: Keep = in_place,
        power: float = 1.0,
    ) -> None:  # fmt: skip
        self.moments_type, self.power, self._keep = moments_type, power, keep
        self._shape, self._device = (output_groups, columns, columns), device
        self._shard: Tensor | None = None
        self._spare: Tensor | None = None  # the previous shard's memory: allocating many matrices anew takes long
        self._total: Tensor | None = None
        self._finished: Tensor | None = None
        # The number of tokens; for guided moments then the trace of each output group's sum at power 1, and at `power`.
        self._counts = torch.zeros(1 + 2 * output_groups, device=device, dtype=torch.float64)
        self._shard_counts = torch.zeros_like(self._counts)

    def add(self, inputs: Tensor, gradient: Tensor | None = None) -> None:
        """Adds a batch of tokens.

        inputs     [..., C], any float dtype
        gradient   for guided moments: the loss's gradient with respect to the outputs, [..., R], where R is a multiple
                   of the output groups

        Products and sums are float32; on a GPU they are cuBLAS's (see `environment.full_float32`). A token whose input
        or weight is not finite, or whose square overflows, is left out.
        """
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        weights, energy = self._weights(x, gradient), x.square().sum(1)
        usable = sum(weights, energy).isfinite()
        x, weights = torch.where(usable[:, None], x, 0.0), [torch.where(usable, weight, 0.0) for weight in weights]
        self._shard_counts[0] += usable.sum()
        if self.power != 1:
            weights = self._raised(weights, torch.where(usable, energy, 0.0).double())
        if self._shard is None:
            self._shard = self._zeros()
        for lower, weight in zip(self._shard, weights, strict=True):
            add_products(lower, x * weight.sqrt()[:, None])

    def _zeros(self) -> Tensor:
        spare, self._spare = self._spare, None
        return torch.zeros(self._shape, device=self._device) if spare is None else spare.zero_()

    def _raised(self, weights: list[Tensor], energy: Tensor) -> list[Tensor]:
        """Returns the weights to the power `power`, and adds to the traces that weights and raised weights give.

        `energy` is |x_t|^2, float64 [tokens].
        """
        raised = [weight.double().pow(self.power) for weight in weights]
        self._shard_counts[1:] += torch.stack([weight.double() @ energy for weight in (*weights, *raised)])
        return [weight.float() for weight in raised]

    def end_shard(self, processes: Processes = ALONE, owner: int = 0, senders: int = 1) -> None:
        """Ends a shard: adds what was added since the last call to the total, which process `owner` keeps.

        It adds the shards of the first `senders` processes in the order of their ranks.
        """
        shard = self._zeros() if self._shard is None else self._shard
        counts = self._shard_counts
        self._shard, self._shard_counts = None, torch.zeros_like(counts)
        for sums in processes.received(shard, owner, senders):
            self._total = self._keep(sums) if self._total is None else self._total.add_(sums.to(self._total.device))
        if shard is not self._total:
            self._spare = shard
        for shard_counts in processes.received(counts, owner, senders):
            self._counts += shard_counts

    def release(self) -> None:
        """Frees the memory that is kept for a further shard."""
        self._spare = None

    def _weights(self, x: Tensor, gradient: Tensor | None) -> list[Tensor]:
        """Returns the weight of each token [tokens], for each output group."""
        if self.moments_type == "plain":
            return [torch.ones_like(x[:, 0])]
        if self.moments_type == "normalized":
            return [x.square().sum(1).clamp_min(1e-30).reciprocal()]
        assert gradient is not None
        return list(gradient.reshape(len(x), self._shape[0], -1).float().square().mean(2).T)

    @property
    def columns(self) -> int:
        return self._shape[-1]

    def sums(self) -> tuple[Tensor, Tensor]:
        """Returns the sums over all tokens.

        They are the matrices [output groups, C, C], correct on and below the diagonal alone, and the counts float64, of
        which the first is the number of tokens.
        """
        if self._shard is not None or self._total is None:
            self.end_shard()
        self.release()
        assert self._total is not None
        return self._total, self._counts

    def add_average(self, total: Tensor, counts: Tensor, tokens: float) -> None:
        """Adds the average of other tokens `tokens` times, given their `sums`: the matrices `total`, and `counts`.

        It adds nothing if they are of no tokens.
        """
        share = tokens / counts[0].clamp_min(1)
        matrices, token_counts = self.sums()
        matrices += (total * share.to(total.device, torch.float32)).to(matrices.device)
        token_counts += counts * share

    def hessian(self) -> Tensor:
        """Returns H, float32 [C, C], or [output groups, C, C] if there are several; identities if there was no token.

        H overwrites the sums, so nothing can be added afterwards.
        """
        if self._finished is None:
            total, self._total = self.sums()[0], None
            self._finished = self._mean(total)
        return self._finished

    def _mean(self, total: Tensor) -> Tensor:
        """Overwrites the sums [output groups, C, C], correct on and below the diagonal, with H and returns H."""
        tokens, groups = self._counts[0].clamp_min(1), len(total)
        if not self._counts[0]:
            total.diagonal(dim1=1, dim2=2).fill_(1)
        mirror(total)
        divisor = tokens.expand(groups)
        if self.power != 1:
            at_one, raised = self._counts[1:].split(groups)
            divisor = divisor * torch.where(at_one > 0, raised / at_one, 1.0)
        total /= divisor.to(total.device, torch.float32)[:, None, None]
        return total[0] if len(total) == 1 else total


class TokenWeights:
    """Collects the tokens' weights of guided second moments alone, to be used with other inputs of the same tokens.

    It takes the place of a linear's `SecondMoments` in the guided pass, with one output group.
    """

    def __init__(self, columns: int, power: float) -> None:
        self._power = power
        self._shard: list[Tensor] = []
        self._shards: list[Tensor] = []

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Adds a batch of tokens by the loss's gradient with respect to the outputs, [..., R]. Inputs are not used."""
        self._shard.append(gradient.reshape(-1, gradient.shape[-1]).float().square().mean(1).cpu())

    def end_shard(self, processes: Processes = ALONE, owner: int = 0, senders: int = 1) -> None:
        """Ends a shard: takes over what all processes have added since the last call, in the order of their ranks."""
        for batches in processes.gathered(self._shard):
            self._shards += batches
        self._shard = []

    def hessian(self) -> Tensor:
        """Returns the weights to the power, float32 [tokens], scaled to the sum that they have at the power 1.

        A weight that is not finite becomes 0. The method is called as that of `SecondMoments`, so that the guided pass
        can treat both alike.
        """
        raw = torch.cat(self._shards + self._shard).double()
        raw = torch.where(raw.isfinite(), raw, 0.0)
        raised = raw.pow(self._power)
        return (raised * (raw.sum() / raised.sum().clamp_min(1e-300))).float()


class InputSquares:
    """The sums of squares of a linear's inputs, which an importance matrix holds: the diagonal of plain second moments.

    It takes the place of a linear's `SecondMoments` in a forward pass.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self._shard = torch.zeros(1 + columns, dtype=torch.float64, device=device)
        self._total = torch.zeros_like(self._shard)

    def add(self, inputs: Tensor) -> None:
        """Adds a batch of tokens, [..., C] of any float dtype. A token with a value that is not finite is left out."""
        squares = inputs.reshape(-1, inputs.shape[-1]).double().square()
        squares = squares[squares.isfinite().all(1)]
        self._shard[0] += len(squares)
        self._shard[1:] += squares.sum(0)

    def end_shard(self, processes: Processes = ALONE, owner: int = 0, senders: int = 1) -> None:
        """Ends a shard, as `SecondMoments.end_shard` does."""
        shard, self._shard = self._shard, torch.zeros_like(self._shard)
        for sums in processes.received(shard, owner, senders):
            self._total += sums

    def hessian(self) -> Tensor:
        """Returns the number of tokens and then the sums, float64 [1 + C]. It is called as that of `SecondMoments`."""
        return self._total
