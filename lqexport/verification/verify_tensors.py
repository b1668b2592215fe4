"""Checks the tensors of a written model, read from the file alone.

The structure is compared with the source's architecture, and every tensor with the source's weights and the artifact's
digests.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lqexport.converters.factors import is_factor
from lqexport.converters.models.architectures import architecture_of
from lqexport.converters.models.further import is_further
from lqexport.converters.models.tensor_names import is_tied
from lqexport.errors import ANEW, listed, well_formed
from lqexport.models.adapters import LowRankFactors, misfits
from lqexport.models.interface import Weights
from lqexport.models.modules import expected_shapes
from lqexport.models.written import Export, Packed, stored
from lqexport.runtime.progress import Listener
from lqexport.storage.artifact import Artifact, StoredTensor, decoded, digest
from lqexport.verification.crosscheck import CrossCheck
from lqexport.verification.result import TensorCheck, Verification

READ = ("run.json", "report.json")
"""Files, besides the manifest, that are read from the artifact that a file was made from."""
ROWS = 1024
"""How many rows of a tensor are compared with the source's at once."""


def check_structure(result: Verification, export: Weights, factors: LowRankFactors | None, source: Weights) -> bool:
    """Returns whether the file has every tensor of the source's architecture, in its shape, and corrections that fit.

    Adds a sentence to `result.failed` for everything that is wrong.
    """
    expected, present = expected_shapes(source.config), {name: export.shape(name) for name in export.names()}
    architecture, given = architecture_of(source.config), set(source.names())
    further = [name for name in present if is_further(architecture, name) and name in given]
    expected |= {name: source.shape(name) for name in further}
    # A checkpoint may lack biases that the class has: they are 0.
    missing = [name for name in expected if name not in present and (name in given or not name.endswith(".bias"))]
    wrong = [
        f"{name} is {list(present[name])}, not {list(shape)}"
        for name, shape in expected.items()
        if name in present and present[name] != shape
    ]
    if missing:
        result.failed.append(f"{len(missing)} of {len(expected)} tensors are missing: {listed(missing, 3)}.")
    if wrong:
        result.failed.append(f"{len(wrong)} tensors have another shape: {listed(wrong, 3)}.")
    # ExLlamaV2's folders hold a separate output where the source's output shares the embedding's weights.
    separate = architecture.output if is_tied(source.config) else None
    if unknown := [name for name in present if name not in expected and name != separate]:
        result.warnings.append(f"{len(unknown)} tensors are not of the architecture: {listed(unknown, 3)}.")
    unfit = misfits(export, factors) if factors else []
    result.failed += unfit
    return not missing and not wrong and not unfit


def check_files(result: Verification, artifact: Artifact | None) -> None:
    """Compares files of an artifact with the digests in its manifest, and reports differences in `failed`.

    If the artifact itself is verified, all its files are compared. If the file was made from the artifact, or is a
    native folder with its record, only the files in READ are compared.
    """
    if artifact is None:
        return
    is_verified = artifact.folder.samefile(result.file)
    if damaged := artifact.damaged(None if is_verified else READ):
        result.failed.append(
            f"{len(damaged)} files of {artifact.folder} are gone or not as they were written: {listed(damaged, 3)}."
        )


def check_tensors(
    result: Verification,
    export: Export,
    factors: LowRankFactors | None,
    source: Weights,
    artifact: Artifact | None,
    listener: Listener,
) -> None:
    """Reads every tensor of the file and its adapter: checks its digest, finite values and error against the source.

    Adds a `TensorCheck` for each to `result.tensors`, and sentences to `failed` and `warnings`.
    """
    manifest, kernels = artifact.manifest() if artifact else None, CrossCheck(result.device)
    output_errors = _recorded_errors(artifact) if artifact else {}
    holders: dict[str, Packed] = dict.fromkeys(export.names(), export)
    if factors:
        holders |= dict.fromkeys(factors.names(), factors)
    names, known = list(holders), set(source.names())
    listener.stage("Read the tensors", len(names))
    for name, holder in holders.items():
        tensor = stored(holder, name)
        original = source.read(name) if name in known else None
        same_bytes = None if manifest is None else _same_bytes(tensor, manifest)
        result.tensors.append(_check(tensor, original, output_errors.get(name), same_bytes, kernels))
        listener.advance(1)
    result.decoding = kernels.sentence(len(names))
    if kernels.different:
        names_shown = listed(kernels.different, 3)
        result.failed.append(
            f"{len(kernels.different)} tensors decode to other values by the CUDA kernels: {names_shown}."
        )
    if broken := [tensor.name for tensor in result.tensors if not tensor.finite]:
        result.failed.append(f"{len(broken)} tensors hold values that are not finite: {listed(broken, 3)}.")
    changed = [tensor.name for tensor in result.tensors if tensor.same_bytes is False]
    if artifact and changed:
        result.failed.append(f"{len(changed)} tensors are not those of {artifact.folder}: {listed(changed, 3)}.")
    absent = [name for name in manifest or () if name not in holders]
    if not factors and any(is_factor(name) for name in absent):
        result.warnings.append("The artifact holds low-rank corrections, and the file is read without an adapter.")
        absent = [name for name in absent if not is_factor(name)]
    if absent:
        result.failed.append(f"{len(absent)} tensors of the artifact are not in the file: {listed(absent, 3)}.")


def _same_bytes(tensor: StoredTensor, manifest: dict[str, dict[str, Any]]) -> bool | None:
    """Returns whether a tensor has the codec and digest that the manifest gives.

    Returns None for low-rank factors that the artifact stores in another type than float16 or float32: PEFT and native
    folders hold their values in float32, so the digests differ.
    """
    entry = manifest.get(tensor.name, {})
    if is_factor(tensor.name) and tensor.codec_name == "gguf:F32" != entry.get("codec"):
        return None
    return (entry.get("codec"), entry.get("sha256")) == (tensor.codec_name, digest(tensor.planes))


def _recorded_errors(artifact: Artifact) -> dict[str, float]:
    """Returns name -> relative output error for every solved tensor, as the run wrote it into report.json."""
    entries = artifact.report().get("tensors", [])
    with well_formed(artifact.folder / "report.json", ANEW):
        return {entry["name"]: entry["relative_error"] for entry in entries if entry.get("relative_error") is not None}


def _check(
    tensor: StoredTensor,
    original: Tensor | None,
    output_error: float | None,
    same_bytes: bool | None,
    kernels: CrossCheck,
) -> TensorCheck:
    values = decoded(tensor)
    kernels.add(tensor, values)
    nbytes = sum(plane.nbytes for plane in tensor.planes.values())
    error = None if original is None or original.shape != values.shape else relative_error(values, original)
    finite = bool(np.isfinite(values).all())
    return TensorCheck(tensor.name, tensor.codec_name, tensor.shape, nbytes, error, output_error, finite, same_bytes)


def relative_error(values: NDArray[np.float32], original: Tensor) -> float:
    """Returns the sum of squares of (values - original), relative to the sum of squares of the original.

    The original may have any float dtype. Returns 0 if both sums are 0, infinity if only the original's is. Computes
    ROWS rows at a time, since an embedding is large even without float32 copies.
    """
    error = energy = 0.0
    for start in range(0, len(values), ROWS):
        reference = original[start : start + ROWS].float().numpy()
        difference = values[start : start + ROWS] - reference
        error += float(np.vdot(difference, difference))
        energy += float(np.vdot(reference, reference))
    if energy == 0:
        return 0.0 if error == 0 else math.inf
    return error / energy


def lossiest(tensors: list[TensorCheck]) -> str | None:
    """Returns the name of the matrix whose weights have the largest relative error; None if no matrix has an error."""
    matrices = [tensor for tensor in tensors if len(tensor.shape) == 2 and (tensor.weight_error or 0) > 0]
    return max(matrices, key=lambda tensor: tensor.weight_error or 0).name if matrices else None
