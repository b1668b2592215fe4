"""End-to-end tuning: moves the floating-point numbers that a file stores until the model predicts as its source does.

Codes and integers stay as they were solved, so the file does not grow. These numbers are tuned: the gains of the norms,
biases, and the float16 numbers of every solved linear's grid. The latter are the scales and offsets of superblocks or
groups, the tables, EXL2's maxima, or EXL3's scales of inputs and outputs. The loss is the mean KL(source || quantized)
over all positions of some calibration sequences. The method is the second phase of EfficientQAT (Chen et al. 2024,
E2E-QP), but it aims at the source's predictions instead of the next token, and it tunes the norms, too.

A step runs one sequence forward through all blocks and keeps the inputs of each block. Then it goes backward and runs
each block again, with gradients. The device holds one block's decoded weights and both models' outputs. The host holds
the tuned numbers, where the optimizer works, the optimizer's moments, and the sequence's hidden states. Codes and grids
that do not fit into memory are read again for each block (`lqexport.tuning.tensor_cache`). The state is saved every few
steps, so a stopped run goes on from there and ends in the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import kl_div, log_softmax

from lqexport.calibration.collect import embed_batches, final_states
from lqexport.errors import AGAIN
from lqexport.formats.codec import BFLOAT16, PlainCodec, TrellisCodec
from lqexport.formats.registry import codec_named
from lqexport.grids.grid import Numbers, round_half
from lqexport.models.blocks import BlockModel
from lqexport.runtime.progress import Listener
from lqexport.solver.corrected_linear import stored_correction
from lqexport.storage.artifact import Artifact
from lqexport.storage.tensor_files import SEAL, open_tensors, write_sealed
from lqexport.tuning.tensor_cache import TensorCache, unpack
from lqexport.tuning.tuned_numbers import State, numbers, straight_through, tuned_values, unit, with_stored

SAVE_EVERY = 4
"""Number of steps after which the state is saved."""
ADAM = ("step", "exp_avg", "exp_avg_sq")
"""What Adam keeps of a number that has had a gradient."""
HELD_OUT = 8
"""Number of sequences that are not tuned on. They tell whether tuning helped."""
WARM_UP = 4
"""Steps over which the learning rate rises. The rate also falls linearly to zero over all steps."""
BETAS = (0.9, 0.95)
"""Adam's decay rates of the first and the second moments."""

Decoder = Callable[[], Tensor]
"""Returns a tensor's values with the changes so far. They have gradients with respect to the changes."""


@dataclass(frozen=True)
class Outcome:
    """The mean loss on the held-out sequences before and after tuning.

    before, after   KL divergence in nats per token; for an encoder, the cosine distance of embeddings
    loss            `kl` or `distance`
    """

    before: float
    after: float
    loss: str = "kl"

    @property
    def kept(self) -> bool:
        """Whether the tuned numbers are better than the solved ones. Only then the artifact holds them."""
        return self.after < self.before

    def facts(self) -> dict[str, Any]:
        """Returns what the report records."""
        name = f"held_out_{self.loss}"
        return {f"{name}_before": self.before, f"{name}_after": self.after, "kept": self.kept}


def _handing_on(decode: Decoder, dtype: torch.dtype) -> Tensor:
    """Returns a tensor's values, which hand their gradient on to the tensor's changes as soon as they have one.

    So only one tensor of a block at a time holds a gradient and the intermediate results of decoding.
    """
    decoded = decode()
    values = decoded.detach().to(dtype)
    if not decoded.requires_grad:
        return values
    values.requires_grad_()
    exact = decoded.dtype

    def hand_on(values: Tensor) -> None:
        assert values.grad is not None
        with torch.enable_grad():
            decode().backward(values.grad.to(exact))
        values.grad = None

    values.register_post_accumulate_grad_hook(hand_on)
    return values


class Tuner:
    """Tunes a solved artifact whose tensors are all written.

    solved        the model whose weights are what the artifact's tensors decode to
    source        the full-precision model
    tokens        int64 [sequences + HELD_OUT, length]; the held-out sequences come last
    rate          the learning rate, over the square root of the held-out loss before tuning
    folder        holds what a stopped run goes on from
    cache_bytes   bytes on the device and on the host in which tensors may be kept unpacked
    """

    def __init__(
        self, artifact: Artifact, solved: BlockModel, source: BlockModel, tokens: Tensor, *, rate: float,
        folder: Path, listener: Listener, cache_bytes: tuple[int, int] = (0, 0),
    ) -> None:  # fmt: skip
        self.artifact, self.solved, self.source, self.folder, self.listener = artifact, solved, source, folder, listener
        self.tokens, self.rate = tokens, rate
        self.tensors = TensorCache(artifact, solved.device, cache_bytes)
        self.steps = len(tokens) - HELD_OUT
        self.blocks = [solved.names(index) for index in range(len(solved))]
        self.encoder = solved.architecture.encoder
        self.norm = f"{solved.architecture.final_norm}.weight"

    @cached_property
    def deltas(self) -> State:
        """The change of each tuned number, in units of `unit`, zero at first. The keys are TENSOR/NUMBER."""
        deltas = {}
        final = [] if self.encoder else [self.norm]
        for name in [name for names in self.blocks for name in names] + final:
            for number, values in self._numbers(name).items():
                deltas[f"{name}/{number}"] = torch.zeros_like(values, device="cpu", requires_grad=True)
        return deltas

    def _numbers(self, name: str) -> State:
        unpacked = self.tensors[name]
        if unpacked.grid is not None:
            return numbers(unpacked.grid)
        return {"vector": unpacked.codes} if unpacked.codes.ndim == 1 else {}

    def _moved(self, name: str, values: State) -> State:
        """Returns a tensor's numbers with the changes so far. They have gradients with respect to the changes."""
        moved = {}
        for number, base in values.items():
            moved[number] = base + unit(number, base) * self.deltas[f"{name}/{number}"].to(base.device)
            if f"{name}/{number}" in self._bfloats:
                # Of a bfloat16's 8 bits, the steps of tuning are not many: the loss is that of the stored number.
                moved[number] = straight_through(moved[number], moved[number].bfloat16().float())
        return moved

    @cached_property
    def _bfloats(self) -> frozenset[str]:
        """The keys of the tuned numbers that the file stores in bfloat16."""
        bfloats = set()
        for key in self.deltas:
            name, _, number = key.rpartition("/")
            stored = getattr(self.tensors[name].grid, number, None)
            vector = number == "vector" and self.artifact.read(name).codec_name == "gguf:BF16"
            if vector or (isinstance(stored, Numbers) and stored.format.floats == BFLOAT16):
                bfloats.add(key)
        return frozenset(bfloats)

    def _decoder(self, name: str) -> Decoder:
        """Loads a tensor and returns its decoder, with the low-rank correction added if there is one."""
        unpacked = self.tensors[name]
        grid, codes = unpacked.grid, unpacked.codes
        if grid is None:
            return lambda: self._moved(name, {"vector": codes})["vector"] if codes.ndim == 1 else codes
        correction = stored_correction(self.artifact, name)

        def decode() -> Tensor:
            values = tuned_values(grid, codes, self._moved(name, numbers(grid)))
            return values if correction is None else values + correction.to(values.device)

        return decode

    def _block(self, index: int) -> dict[str, tuple[Decoder, torch.dtype]]:
        """Returns the decoders of block `index` by the names of the block's parameters, and the parameters' dtypes."""
        prefix, dtypes = f"{self.solved.architecture.blocks}.{index}.", self.solved.multiplied(index)
        tensors = {name.removeprefix(prefix): name for name in self.blocks[index]}
        return {key: (self._decoder(name), dtypes.get(key, self.solved.dtype)) for key, name in tensors.items()}

    def run(self) -> Outcome:
        """Tunes, and writes the tuned numbers into the artifact if the held-out loss got smaller.

        Raises UserError if a file that a stopped run has left in `folder` is damaged.
        """
        done = self.folder / "tuned.safetensors"
        if not done.is_file():
            self._optimize(done)
        with open_tensors(done, "pt", AGAIN) as file:
            new = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            outcome = Outcome(**json.loads(file.metadata()["facts"])["outcome"])
        for name in sorted({key.rpartition("/")[0] for key in new}):
            tuned = {key.rpartition("/")[2]: values for key, values in new.items() if key.rpartition("/")[0] == name}
            self._store(name, {number: values.to(self.solved.device) for number, values in tuned.items()})
        return outcome

    def _optimize(self, done: Path) -> None:
        """Runs all steps, and writes the tuned numbers and the outcome to the file `done`."""
        targets, inputs = self._targets(), embed_batches(self.solved, list(self.tokens.split(1)))
        self.solved.let_go()
        optimizer = torch.optim.Adam(list(self.deltas.values()), betas=BETAS)
        reached, before = self._resume(optimizer)
        self.listener.stage("Tuning end to end", self.steps - reached)
        before = self._held_out(inputs, targets) if before is None else before
        # Solved weights are off by about sqrt(KL), relatively, and so are the numbers to tune.
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
        """Returns the source's hidden states [length, hidden] after its last block, for every sequence.

        They are kept on disk. Raises UserError if the file is damaged.
        """
        path = self.folder / "source.safetensors"
        if not path.is_file():
            hidden = final_states(self.source, self.tokens, self.listener, "Predictions of the source")
            _write(path, {"hidden": torch.stack(hidden)}, {})
            self.source.let_go()
        with open_tensors(path, "pt", AGAIN) as file:
            return list(file.get_tensor("hidden"))

    def _step(self, inputs: Tensor, target: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Takes one sequence's hidden states [1, length, hidden] forward and backward, and makes one step of Adam."""
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
        """Returns the hidden states [1, length, hidden] before each block and after the last, on the host."""
        hidden = [inputs]
        for index in range(len(self.blocks)):
            state = {name: decode().to(dtype) for name, (decode, dtype) in self._block(index).items()}
            hidden.append(self.solved.run_as(index, state, hidden[-1].to(self.solved.device)).cpu())
        return hidden

    def _head_backward(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Returns the gradient of the loss with respect to the last block's outputs.

        The gradient with respect to the final norm is added to that of its change.
        """
        with torch.enable_grad():
            hidden = hidden.to(self.solved.device).detach().requires_grad_()
            self._divergence(hidden[0], target).backward()
        assert hidden.grad is not None
        return hidden.grad

    def _divergence(self, state: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of a sequence, from both models' hidden states [length, hidden] after the last block.

        It is the mean KL(source || solved) over the positions; for an encoder, 1 - cosine of the embeddings.
        """
        if self.encoder:
            pair = (self.solved.embedding(state[None]), self.source.embedding(target[None].to(state.device)))
            return 1 - (pair[0] * pair[1]).sum()
        solved = log_softmax(self.solved.logits(state, {"weight": self._decoder(self.norm)()}), -1)
        source = log_softmax(self.source.logits(target.to(state.device)), -1)
        return kl_div(solved, source, reduction="batchmean", log_target=True)

    def _block_backward(self, index: int, hidden: Tensor, gradient: Tensor) -> Tensor:
        """Returns the gradient with respect to a block's inputs, from that of its outputs.

        The gradients with respect to the block's numbers are added to those of their changes.
        """
        with torch.enable_grad():
            state = {name: _handing_on(*tensor) for name, tensor in self._block(index).items()}
            hidden = hidden.to(self.solved.device).detach().requires_grad_()
            self.solved.run_as(index, state, hidden).backward(gradient)
        assert hidden.grad is not None
        return hidden.grad

    @torch.no_grad()
    def _held_out(self, inputs: list[Tensor], targets: list[Tensor]) -> float:
        """Returns the mean loss of the held-out sequences."""
        device, pairs = self.solved.device, zip(inputs[-HELD_OUT:], targets[-HELD_OUT:], strict=True)
        return sum(float(self._divergence(self._forward(x)[-1][0].to(device), y)) for x, y in pairs) / HELD_OUT

    def _save(self, step: int, before: float, optimizer: torch.optim.Adam) -> None:
        """Saves what the next step needs.

        A number that has had no gradient yet, such as of an expert without tokens, has no state in the optimizer.
        """
        content: State = {}
        for key, delta in self.deltas.items():
            content |= {f"{key}/{name}": values for name, values in optimizer.state[delta].items()}
            content[f"{key}/delta"] = delta.detach()
        _write(self.folder / "tuning.safetensors", content, {"step": step, "before": before})

    def _resume(self, optimizer: torch.optim.Adam) -> tuple[int, float | None]:
        """Loads the last saved state.

        Returns how many steps are done, and the held-out loss before the first; 0 and None if nothing is saved.
        """
        path = self.folder / "tuning.safetensors"
        if not path.is_file():
            return 0, None
        with open_tensors(path, "pt", AGAIN) as file:
            state, present = json.loads(file.metadata()["facts"]), set(file.keys())
            for key, delta in self.deltas.items():
                delta.data.copy_(file.get_tensor(f"{key}/delta"))
                kept = {name: file.get_tensor(f"{key}/{name}") for name in ADAM if f"{key}/{name}" in present}
                if kept:  # a file of an earlier version has no `step` of its own for each number
                    optimizer.state[delta] = {"step": torch.tensor(float(state["step"]))} | kept
        return state["step"], state["before"]

    def _finished(self) -> State:
        """Returns every tuned number as the file will hold it."""
        new: State = {}
        for name in sorted({key.rpartition("/")[0] for key in self.deltas}):
            for number, values in self._moved(name, self._numbers(name)).items():
                exact = number == "vector" or f"{name}/{number}" in self._bfloats
                values = values.detach() if exact else round_half(values.detach())
                new[f"{name}/{number}"] = values.cpu()
        return new

    def _store(self, name: str, new: State) -> None:
        """Writes a tensor again with new numbers.

        A repetition does no harm, since the new numbers are not relative to the old ones.
        """
        tensor = self.artifact.read(name)
        codec = codec_named(tensor.codec_name)
        if isinstance(codec, PlainCodec):
            planes = codec.encode_values(new["vector"].reshape(1, -1).cpu().numpy())
        elif isinstance(codec, TrellisCodec):
            walks = codec.unpack(tensor.planes, tensor.shape[1])
            inputs, outputs = (new[scales].cpu().numpy().astype(np.float16) for scales in ("inputs", "outputs"))
            planes = codec.encode(replace(walks, inputs=inputs, outputs=outputs))
        else:
            grid, codes = with_stored(unpack(tensor, self.solved.device), new)
            planes = codec.encode(grid, codes)  # type: ignore[arg-type]  # a grid of this codec
        self.artifact.write(replace(tensor, planes=planes, facts=tensor.facts | {"tuned": True}))


def _write(path: Path, content: State, facts: dict[str, Any]) -> None:
    metadata = {"facts": json.dumps(facts | {"sha256": SEAL}, sort_keys=True)}
    write_sealed(path, safetensors.torch.save({key: tensor.contiguous() for key, tensor in content.items()}, metadata))
