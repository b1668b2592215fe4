"""Second moments of a linear's inputs (the Hessian of its squared output error), and importances made from them."""

from __future__ import annotations

import torch
from torch import Tensor

from lqexport.recipe import Moments
from lqexport.runtime.placement import Keep, in_place
from lqexport.runtime.processes import ALONE, Processes

Group = tuple[str, ...]
"""Names of linears in a block that share their second moments."""
PANELS = 8
"""Of a symmetric matrix only what is below the diagonal is added up, in so many panels: 0.56 of the products."""


class SecondMoments:
    """H = sum over tokens of s_t x_t x_t^T, divided by the number of tokens. The weight s_t of a token is

    plain        1
    normalized   1 / |x_t|^2. A few tokens with massive activations (the first of a sequence, separators) otherwise rule
                 H, and the solver spends its freedom on outputs that the end loss does not depend on
    guided       the mean over the outputs j of (d loss / d z_tj)^2, z = W x, loss the summed cross-entropy: Kim et al.
                 2025 (GuidedQuant, eq. 7), one H for each of `output_groups` equal runs of outputs. Half of d H d^T,
                 summed over rows, then estimates in nats per token what the error d of the weights costs the model.
                 These means are raised to `power` first: below 1, fewer tokens rule H, and it holds better on text that
                 it was not taken from. H then gets the trace that it has at 1, so it still estimates nats

    Tokens may come in shards: each is summed by itself, and the sums are added in the order of the shards, so the bits
    do not depend on which process of several had which. `keep` says where the total is: it is only added to, and
    additions are the same everywhere.
    """

    def __init__(
        self, columns: int, kind: Moments, device: torch.device, output_groups: int = 1, keep: Keep = in_place,
        power: float = 1.0,
    ) -> None:  # fmt: skip
        self.kind, self.power, self._keep = kind, power, keep
        self._shape, self._device = (output_groups, columns, columns), device
        self._shard: Tensor | None = None
        self._spare: Tensor | None = None  # the memory of the shard before: fresh memory of many matrices takes long
        self._total: Tensor | None = None
        self._finished: Tensor | None = None
        # The number of tokens; then, guided, the trace of each output group's sum at power 1, and as it is.
        self._counts = torch.zeros(1 + 2 * output_groups, device=device, dtype=torch.float64)
        self._shard_counts = torch.zeros_like(self._counts)

    def add(self, inputs: Tensor, gradient: Tensor | None = None) -> None:
        """Add inputs [..., C] of any float dtype; products and sums are float32, on a GPU cuBLAS's (see
        `environment.full_float32`). Guided: and the loss's gradient [..., R] by the outputs, R a multiple of the output
        groups.

        A token whose input or weight is not finite, or whose square overflows, is left out."""
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        weights, energy = self._weights(x, gradient), x.square().sum(1)
        usable = sum(weights, energy).isfinite()
        x, weights = torch.where(usable[:, None], x, 0.0), [torch.where(usable, weight, 0.0) for weight in weights]
        self._shard_counts[0] += usable.sum()
        if self.power != 1:
            weights = self._raised(weights, torch.where(usable, energy, 0.0).double())
        if self._shard is None:
            self._shard = self._zeros()
        columns = x.shape[1]
        for lower, weight in zip(self._shard, weights, strict=True):
            weighted = x * weight.sqrt()[:, None]
            for start in range(0, columns, width := -(-columns // PANELS)):
                panel = slice(start, start + width)
                lower[start:, panel].addmm_(weighted[:, start:].T, weighted[:, panel])

    def _zeros(self) -> Tensor:
        spare, self._spare = self._spare, None
        return torch.zeros(self._shape, device=self._device) if spare is None else spare.zero_()

    def _raised(self, weights: list[Tensor], energy: Tensor) -> list[Tensor]:
        """The weights to the power, counting what both make of the tokens' energy float64 [tokens]."""
        raised = [weight.double().pow(self.power) for weight in weights]
        self._shard_counts[1:] += torch.stack([weight.double() @ energy for weight in (*weights, *raised)])
        return [weight.float() for weight in raised]

    def end_shard(self, processes: Processes = ALONE, owner: int = 0, senders: int = 1) -> None:
        """Add what has come since the last call to the total, which process `owner` keeps: the shards of the first
        `senders` processes, in their order."""
        shard = self._zeros() if self._shard is None else self._shard
        counts = self._shard_counts
        self._shard, self._shard_counts = None, torch.zeros_like(counts)
        for part in processes.received(shard, owner, senders):
            self._total = self._keep(part) if self._total is None else self._total.add_(part.to(self._total.device))
        if shard is not self._total:
            self._spare = shard
        for part in processes.received(counts, owner, senders):
            self._counts += part

    def release(self) -> None:
        """No further shard comes: let go of the memory that is kept for it."""
        self._spare = None

    def _weights(self, x: Tensor, gradient: Tensor | None) -> list[Tensor]:
        """Each token's weight [tokens], for each output group."""
        if self.kind == "plain":
            return [torch.ones_like(x[:, 0])]
        if self.kind == "normalized":
            return [x.square().sum(1).clamp_min(1e-30).reciprocal()]
        assert gradient is not None
        return list(gradient.reshape(len(x), self._shape[0], -1).float().square().mean(2).T)

    @property
    def columns(self) -> int:
        return self._shape[-1]

    def sums(self) -> tuple[Tensor, Tensor]:
        """Of all tokens: the matrices [output groups, C, C], correct on and below the diagonal, and what was counted,
        the tokens first."""
        if self._shard is not None or self._total is None:
            self.end_shard()
        self.release()
        assert self._total is not None
        return self._total, self._counts

    def add_average(self, total: Tensor, counts: Tensor, tokens: float) -> None:
        """Add the average of so many of the tokens that other `sums` are of; nothing where they are of none."""
        share = tokens / counts[0].clamp_min(1)
        own, own_counts = self.sums()
        own += (total * share.to(total.device, torch.float32)).to(own.device)
        own_counts += counts * share

    def hessian(self) -> Tensor:
        """float32 [C, C], or [output groups, C, C] where there are several; an identity where no input was seen. Made
        in the place of the sums, so nothing can be added afterwards."""
        if self._finished is None:
            total, self._total = self.sums()[0], None
            self._finished = self._mean(total)
        return self._finished

    def _mean(self, total: Tensor) -> Tensor:
        """`hessian` in the place of the sums [output groups, C, C] below the diagonal."""
        tokens, groups = self._counts[0].clamp_min(1), len(total)
        if not self._counts[0]:
            total.diagonal(dim1=1, dim2=2).fill_(1)
        for start in range(0, columns := total.shape[-1], width := -(-columns // PANELS)):
            corner = total[:, start : start + width, start : start + width]
            corner.copy_(corner.tril() + corner.tril(-1).mT)
            total[:, start : start + width, start + width :] = total[:, start + width :, start : start + width].mT
        divisor = tokens.expand(groups)
        if self.power != 1:
            at_one, raised = self._counts[1:].split(groups)
            divisor = divisor * torch.where(at_one > 0, raised / at_one, 1.0)
        total /= divisor.to(total.device, torch.float32)[:, None, None]
        return total[0] if len(total) == 1 else total


class TokenWeights:
    """The weights of guided second moments by themselves, for other inputs of the same tokens. It takes the place of a
    linear's `SecondMoments` in the guided pass, with one output group."""

    def __init__(self, columns: int, power: float) -> None:
        self._power = power
        self._shard: list[Tensor] = []
        self._shards: list[Tensor] = []

    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """Add the tokens of a batch, by the loss's gradient [..., R] by the outputs."""
        self._shard.append(gradient.reshape(-1, gradient.shape[-1]).float().square().mean(1).cpu())

    def end_shard(self, processes: Processes = ALONE, owner: int = 0, senders: int = 1) -> None:
        """Take what has come since the last call, of all processes in their order."""
        for batches in processes.gathered(self._shard):
            self._shards += batches
        self._shard = []

    def hessian(self) -> Tensor:
        """float32 [tokens], to the power, with the sum that they have at power 1; 0 where one is not finite."""
        raw = torch.cat(self._shards + self._shard).double()
        raw = torch.where(raw.isfinite(), raw, 0.0)
        raised = raw.pow(self._power)
        return (raised * (raw.sum() / raised.sum().clamp_min(1e-300))).float()
