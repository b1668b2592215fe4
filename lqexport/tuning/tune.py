"""End-to-end tuning: what a file stores as floating-point numbers, moved until the model predicts as its source does.

Codes and integers stay as they were solved. Tuned are the gains of the norms (and biases, where there are any), and of
every solved linear the float16 numbers of its grid: the scales and offsets of superblocks or groups, the tables, or
EXL2's maxima. The file does not grow. The loss is the mean KL(source || quantized) over every position of some
calibration sequences. The method is the second phase of EfficientQAT (Chen et al. 2024, E2E-QP) with the source's
predictions in the place of the next token, and with the norms.

A step runs one sequence forward through all blocks, keeping the inputs of each, then backward, running each block again
with gradients. On the device are one block's decoded weights and both models' outputs; on the host, where the optimizer
works, are the tuned numbers with its moments, and the sequence's hidden states. Codes and grids are read anew for each
block where they have no room (`lqexport.tuning.tensor_cache`). The last steps are kept on disk, so a stopped run goes on from
there and ends in the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lqexport.calibration.collect import embed_batches, final_states
from lqexport.errors import AGAIN
from lqexport.formats.codec import Grid, PlainCodec, Sections
from lqexport.formats.registry import codec_named
from lqexport.grids.grid import TensorGrid, round_half
from lqexport.grids.sections import TensorSections
from lqexport.models.blocks import BlockModel
from lqexport.runtime.progress import Listener
from lqexport.solver.corrected_linear import stored_correction
from lqexport.storage.artifact import Artifact
from lqexport.storage.tensor_files import SEAL, open_tensors, write_sealed
from lqexport.tuning.tensor_cache import Shelf, Unpacked, unpack

SAVE_EVERY = 4
"""Steps after which a stopped run need not start over."""
HELD_OUT = 8
"""Sequences that are not tuned on, to see whether tuning helped."""
WARM_UP = 4
"""Steps over which the rate rises; then it falls to zero, linearly."""
BETAS = (0.9, 0.95)

State = dict[str, Tensor]
Decoder = Callable[[], Tensor]
"""A tensor's values with the changes so far, differentiable by them."""


@dataclass(frozen=True)
class Outcome:
    """Mean loss on the held-out sequences, before and after: KL in nats per token; of an encoder, the cosine distance
    of embeddings."""

    before: float
    after: float
    loss: str = "kl"

    @property
    def kept(self) -> bool:
        """Whether the tuned numbers are better than the solved ones, and so are what the artifact holds."""
        return self.after < self.before

    def facts(self) -> dict[str, Any]:
        name = f"held_out_{self.loss}"
        return {f"{name}_before": self.before, f"{name}_after": self.after, "kept": self.kept}


def numbers(grid: TensorGrid | TensorSections) -> State:
    """The float16 numbers that a grid is made of, as float32: `scale` and `offset`, `levels`, or `sections`."""
    if isinstance(grid, TensorSections):
        return {"sections": grid.numbers()}
    if grid.scale is None:
        return {"levels": grid.levels}
    parts = {"scale": grid.scale, "offset": grid.offset}
    # A power of two has no small changes.
    return {name: part.supers for name, part in parts.items() if part is not None and not part.format.power}


def with_numbers(grid: TensorGrid, new: State) -> TensorGrid:
    """The grid with other numbers in the place of `numbers(grid)`."""
    if "levels" in new:
        return replace(grid, levels=new["levels"])
    scale, offset = (
        replace(part, supers=new[name]) if part and name in new else part
        for name, part in (("scale", grid.scale), ("offset", grid.offset))
    )
    return replace(grid, scale=scale, offset=offset)


def tuned_values(grid: TensorGrid | TensorSections, codes: Tensor, new: State) -> Tensor:
    """The grid's values with other numbers, differentiable by them."""
    if isinstance(grid, TensorSections):
        return grid.with_numbers(new["sections"]).straight_through(codes)
    return with_numbers(grid, new).values(codes)


def _handing_on(decode: Decoder, dtype: torch.dtype) -> Tensor:
    """A tensor's values, which hand their gradient on to its changes as soon as it is there. So only one tensor of a
    block at a time has a gradient and what its values were made from."""
    made = decode()
    values = made.detach().to(dtype)
    if not made.requires_grad:
        return values
    values.requires_grad_()
    exact = made.dtype

    def hand_on(values: Tensor) -> None:
        assert values.grad is not None
        with torch.enable_grad():
            decode().backward(values.grad.to(exact))
        values.grad = None

    values.register_post_accumulate_grad_hook(hand_on)
    return values


def _unit(name: str, values: Tensor) -> Tensor:
    """What a change of 1 means: a scale or offset itself, the spread of a row's table, or a vector's mean size."""
    if name == "levels":
        return values.std(1, keepdim=True)
    return values if name in ("scale", "offset", "sections") else values.abs().mean()


class Tuner:
    """Tunes a solved artifact, all of whose tensors are written.

    solved    the artifact's model, as its tensors decode
    source    the full-precision model
    tokens    int64 [sequences + HELD_OUT, length]; those held out come last
    folder    for what a stopped run goes on from
    cache_bytes   bytes on the device and on the host in which to keep tensors unpacked
    """

    def __init__(
        self, artifact: Artifact, solved: BlockModel, source: BlockModel, tokens: Tensor, rate: float,
        folder: Path, listener: Listener, cache_bytes: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        self.artifact, self.solved, self.source, self.folder, self.listener = artifact, solved, source, folder, listener
        self.tokens, self.rate = tokens, rate
        self.shelf = Shelf(artifact, solved.device, cache_bytes)
        self.steps = len(tokens) - HELD_OUT
        self.blocks = [solved.names(index) for index in range(len(solved))]
        self.encoder = solved.architecture.encoder
        self.norm = f"{solved.architecture.final_norm}.weight"
        self.deltas = self._zeros()

    def _zeros(self) -> State:
        """One change per tuned number, in units of `_unit`; keys are TENSOR/NUMBER."""
        deltas = {}
        last = [] if self.encoder else [self.norm]
        for name in [name for names in self.blocks for name in names] + last:
            for number, values in self._numbers(name).items():
                deltas[f"{name}/{number}"] = torch.zeros_like(values, device="cpu", requires_grad=True)
        return deltas

    def _numbers(self, name: str) -> State:
        unpacked = self.shelf[name]
        if unpacked.grid is not None:
            return numbers(unpacked.grid)
        return {"vector": unpacked.codes} if unpacked.codes.ndim == 1 else {}

    def _moved(self, name: str, values: State) -> State:
        """A tensor's numbers with the changes so far, differentiable by them."""
        moved = {}
        for number, base in values.items():
            moved[number] = base + _unit(number, base) * self.deltas[f"{name}/{number}"].to(base.device)
        return moved

    def _decoder(self, name: str) -> Decoder:
        """Loads a tensor."""
        unpacked = self.shelf[name]
        grid, codes = unpacked.grid, unpacked.codes
        if grid is None:
            return lambda: self._moved(name, {"vector": codes})["vector"] if codes.ndim == 1 else codes
        correction = stored_correction(self.artifact, name)

        def decode() -> Tensor:
            values = tuned_values(grid, codes, self._moved(name, numbers(grid)))
            return values if correction is None else values + correction.to(values.device)

        return decode

    def _block(self, index: int) -> dict[str, tuple[Decoder, torch.dtype]]:
        """Block `index`, by the names of its own parameters, with the dtypes that they are used in."""
        prefix, dtypes = f"{self.solved.architecture.blocks}.{index}.", self.solved.multiplied(index)
        own = {name.removeprefix(prefix): name for name in self.blocks[index]}
        return {key: (self._decoder(name), dtypes.get(key, self.solved.dtype)) for key, name in own.items()}

    def run(self) -> Outcome:
        """Tune, then write what was tuned into the artifact, unless the held-out sequences got worse by it."""
        done = self.folder / "tuned.safetensors"
        if not done.is_file():
            self._optimize(done)
        with open_tensors(done, "pt", AGAIN) as file:
            new = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            outcome = Outcome(**json.loads(file.metadata()["facts"])["outcome"])
        for name in sorted({key.rpartition("/")[0] for key in new}):
            mine = {key.rpartition("/")[2]: values for key, values in new.items() if key.rpartition("/")[0] == name}
            self._store(name, {number: values.to(self.solved.device) for number, values in mine.items()})
        return outcome

    def _optimize(self, done: Path) -> None:
        """All steps; `done` gets the tuned numbers and the outcome."""
        targets, inputs = self._targets(), embed_batches(self.solved, list(self.tokens.split(1)))
        self.solved.let_go()
        optimizer = torch.optim.Adam(list(self.deltas.values()), betas=BETAS)
        reached, before = self._resume(optimizer)
        self.listener.stage("Tuning end to end", self.steps - reached)
        before = self._held_out(inputs, targets) if before is None else before
        # Solved weights are off by about sqrt(KL), and so are the numbers to tune.
        top = self.rate * before**0.5
        for step in range(reached, self.steps):
            rate = top * min(1.0, (step + 1) / WARM_UP) * (1 - step / self.steps)
            self._step(inputs[step], targets[step], optimizer, rate)
            if (step + 1) % SAVE_EVERY == 0:
                self._save(step + 1, before, optimizer)
            self.listener.advance(1)
        outcome = Outcome(before, self._held_out(inputs, targets), "distance" if self.encoder else "kl")
        content = self._finished() if outcome.kept else {}
        _write(done, content, {"outcome": asdict(outcome)})

    def _targets(self) -> list[Tensor]:
        """Hidden states [length, hidden] of the source after its last block, for every sequence; kept on disk."""
        path = self.folder / "source.safetensors"
        if not path.is_file():
            hidden = final_states(self.source, self.tokens, self.listener, "Predictions of the source")
            _write(path, {"hidden": torch.stack(hidden)}, {})
            self.source.let_go()
        with open_tensors(path, "pt", AGAIN) as file:
            return list(file.get_tensor("hidden"))

    def _step(self, inputs: Tensor, target: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """One sequence's hidden states [1, length, hidden] forward and backward, and the changes that follow."""
        hidden = self._forward(inputs)
        gradient = self._head_backward(hidden[-1], target)
        for index in reversed(range(len(self.blocks))):
            gradient = self._block_backward(index, hidden[index], gradient)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def _forward(self, inputs: Tensor) -> list[Tensor]:
        """Hidden states [1, length, hidden] before each block and after the last, on the host."""
        hidden = [inputs]
        for index in range(len(self.blocks)):
            state = {name: decode().to(dtype) for name, (decode, dtype) in self._block(index).items()}
            hidden.append(self.solved.run_as(index, state, hidden[-1].to(self.solved.device)).cpu())
        return hidden

    def _head_backward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """The gradient of the mean KL by the last block's outputs; that by the final norm is added to its change."""
        with torch.enable_grad():
            hidden = hidden.to(self.solved.device).detach().requires_grad_()
            self._divergence(hidden[0], target).backward()
        assert hidden.grad is not None
        return hidden.grad

    def _divergence(self, state: Tensor, target: Tensor) -> Tensor:
        """Mean KL(source || solved) over a sequence, for hidden states [length, hidden] after the last blocks; of an
        encoder, 1 - cosine of its embeddings."""
        if self.encoder:
            pair = (self.solved.embedding(state[None]), self.source.embedding(target[None].to(state.device)))
            return 1 - (pair[0] * pair[1]).sum()
        ours = log_softmax(self.solved.logits(state, {"weight": self._decoder(self.norm)()}), -1)
        theirs = log_softmax(self.source.logits(target.to(state.device)), -1)
        return kl_div(ours, theirs, reduction="batchmean", log_target=True)

    def _block_backward(self, index: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        """The gradient by a block's inputs; those by its numbers are added to their changes."""
        with torch.enable_grad():
            state = {name: _handing_on(*tensor) for name, tensor in self._block(index).items()}
            hidden = hidden.to(self.solved.device).detach().requires_grad_()
            self.solved.run_as(index, state, hidden).backward(gradient)
        assert hidden.grad is not None
        return hidden.grad

    @torch.no_grad()
    def _held_out(self, inputs: list[Tensor], targets: list[Tensor]) -> float:
        """Mean KL over the held-out sequences."""
        device, pairs = self.solved.device, zip(inputs[-HELD_OUT:], targets[-HELD_OUT:], strict=True)
        return sum(float(self._divergence(self._forward(x)[-1][0].to(device), y)) for x, y in pairs) / HELD_OUT

    def _save(self, step: int, before: float, optimizer: torch.optim.Adam) -> None:
        """What the next step needs."""
        content: State = {}
        for key, delta in self.deltas.items():
            content |= {f"{key}/{name}": optimizer.state[delta][name] for name in ("exp_avg", "exp_avg_sq")}
            content[f"{key}/delta"] = delta.detach()
        _write(self.folder / "tuning.safetensors", content, {"step": step, "before": before})

    def _resume(self, optimizer: torch.optim.Adam) -> tuple[int, float | None]:
        """Go on from the last step that was kept: how many are done, and the held-out KL before the first."""
        path = self.folder / "tuning.safetensors"
        if not path.is_file():
            return 0, None
        with open_tensors(path, "pt", AGAIN) as file:
            state = json.loads(file.metadata()["facts"])
            for key, delta in self.deltas.items():
                delta.data.copy_(file.get_tensor(f"{key}/delta"))
                moments = {name: file.get_tensor(f"{key}/{name}") for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[delta] = {"step": torch.tensor(float(state["step"]))} | moments
        return state["step"], state["before"]

    def _finished(self) -> State:
        """Every tuned number as the file will hold it."""
        new: State = {}
        for name in sorted({key.rpartition("/")[0] for key in self.deltas}):
            for number, values in self._moved(name, self._numbers(name)).items():
                values = values.detach() if number == "vector" else round_half(values.detach())
                new[f"{name}/{number}"] = values.cpu()
        return new

    def _store(self, name: str, new: State) -> None:
        """Write a tensor again, with new numbers. Writing it twice does no harm: nothing is relative to the old."""
        tensor = self.artifact.read(name)
        kind = codec_named(tensor.codec_name)
        if isinstance(kind, PlainCodec):
            planes = kind.encode_values(new["vector"].reshape(1, -1).cpu().numpy())
        else:
            planes = kind.encode(*_with_stored(unpack(tensor, self.solved.device), new))  # type: ignore[arg-type]  # its own grid
        self.artifact.write(replace(tensor, planes=planes, facts=tensor.facts | {"tuned": True}))


def _with_stored(unpacked: Unpacked, new: State) -> tuple[Grid | Sections, NDArray[np.uint8]]:
    """The format's own grid with the tuned numbers, and its codes."""
    grid, codes = unpacked.grid, unpacked.codes
    assert grid is not None
    if isinstance(grid, TensorSections):
        return grid.with_numbers(new["sections"]).stored().numpy(), codes.cpu().numpy()
    tuned, codes = with_numbers(grid, new).ascending(codes)
    return tuned.numpy(), codes.cpu().numpy()


def _write(path: Path, content: State, facts: dict[str, Any]) -> None:
    metadata = {"facts": json.dumps(facts | {"sha256": SEAL}, sort_keys=True)}
    write_sealed(path, safetensors.torch.save({key: part.contiguous() for key, part in content.items()}, metadata))
