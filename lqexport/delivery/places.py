"""The names of everything that one export writes. All are made from the name of the file or folder:

model-Q4_K_M.gguf                  the file (or the folder of another target)
model-Q4_K_M-adapter.gguf          its low-rank corrections, if the recipe has a rank
model-Q4_K_M.gguf.record/          README.md (the model card), report.html, verification.json
model-Q4_K_M.gguf.work/            the artifact, and all of the above until it is verified
model-Q4_K_M.failed.gguf           the file in the first one's place, if its verification failed
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from lqexport.converters.gguf.split import is_gguf
from lqexport.errors import UserError
from lqexport.storage.files import check_new, check_path, unfinished
from lqexport.storage.published import record_of
from lqexport.target import AUTO, Target, implied_target, type_at_end


@dataclass(frozen=True)
class Places:
    """The paths of one export.

    model   the file or folder that is asked for
    """

    model: Path

    @property
    def _ending(self) -> str:
        """The suffix of the model's name: `.gguf` for a file, nothing for a folder."""
        return self.model.suffix if is_gguf(self.model) else ""

    def _beside(self, ending: str) -> Path:
        return self.model.with_name(f"{self.model.name.removesuffix(self._ending)}{ending}{self._ending}")

    @property
    def adapter(self) -> Path:
        """The file or folder of low-rank corrections."""
        return self._beside("-adapter")

    @property
    def record(self) -> Path:
        """The folder of card, report page and verification.json, as `push-to-hub --record` wants it."""
        return record_of(self.model)

    @property
    def work(self) -> Path:
        """The folder of everything that is not verified yet."""
        return self.model.with_name(f"{self.model.name}.work")

    @property
    def artifact(self) -> Path:
        """The artifact folder, which `quantize` writes."""
        return self.work / "artifact"

    @property
    def failed(self) -> Places:
        """The places of a model whose verification failed."""
        return Places(self._beside(".failed"))

    def within_work(self, other: Places) -> Places:
        """Returns where the work folder holds what will be moved to the places `other`."""
        return Places(self.work / other.model.name)

    def check(self, target: Target) -> None:
        """Raises UserError if a file or folder of this target cannot have the model's name, or as `check_free`."""
        check_name(self.model, target)
        self.check_free()

    def check_free(self) -> None:
        """Raises UserError if the model exists, or if other files than an export's have the names made from it."""
        check_new(self.model)
        for longest in (self.failed.record, unfinished(self.failed.model)):
            check_path(longest)
        if self.artifact.exists():
            return  # a stopped or failed export, which goes on
        if self.work.exists() and any(self.work.iterdir()):
            raise UserError(f"{self.work} exists and is no work of an export. Delete it, or choose another name.")
        if taken := [path for path in (self.record, self.adapter) if path.exists()]:
            raise UserError(f"{taken[0]} exists without {self.model}. Delete it, or choose another name.")

    def remove(self) -> None:
        """Deletes the model, its adapter and its record, where they exist."""
        for path in (self.model, self.adapter, self.record):
            _remove(path)

    def move_to(self, other: Places) -> None:
        """Renames record, adapter and, last, the model. What has those names is replaced."""
        for old, new in ((self.record, other.record), (self.adapter, other.adapter), (self.model, other.model)):
            if old != new and old.exists():
                _remove(new)
                old.rename(new)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def named_type(path: Path) -> str | None:
    """Returns the type or mix that the name of a GGUF file says, such as Q4_K_M of model-Q4_K_M.gguf; None if none."""
    return type_at_end(path.stem) if is_gguf(path) else None


def target_of(path: Path, *, size: str | None = None, bits: float | None = None) -> str:
    """Returns the target of an export for which none is given: by its size or bits, else the type in the file's name.

    Raises UserError if nothing says the target, or if the name and the size say two.
    """
    type_name = named_type(path)
    if size is not None and type_name:
        raise UserError(
            f"The name {path.name} says {type_name}, and --size chooses types: choose another name, or give "
            f"--target {AUTO} as well."
        )
    if implied := implied_target(size, bits):
        return implied
    if type_name:
        return f"gguf:{type_name}"
    raise UserError(
        f"{path} does not say which type to write: call it like model-Q4_K_M.gguf, or give --target, such as "
        "gguf:Q4_K_M, native:table-3 or gptq:4-g128."
    )


def check_name(path: Path, target: Target) -> None:
    """Raises UserError if a file or folder of this target cannot have this name."""
    is_file = is_gguf(path)
    if target.family == "gguf" and path.is_dir():
        example = path / f"model-{target.type}.gguf"
        raise UserError(f"{path} is a folder, and a GGUF model is a file: name it, such as {example}.")
    if target.family == "gguf" and not is_file:
        raise UserError(f"The name of a GGUF file ends with .gguf: {path.name}.gguf in the place of {path.name}.")
    if target.family != "gguf" and is_file:
        raise UserError(f"The target {target} is written as a folder: give it a name without .gguf, not {path.name}.")
