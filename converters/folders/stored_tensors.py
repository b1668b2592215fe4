"""The tensors of all safetensors files of a folder, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from lqexport.converters.models.tensor_names import as_matrix
from lqexport.errors import UserError
from lqexport.storage.tensor_files import forms, open_tensors


class StoredTensors(Mapping[str, Any]):
    """A folder's tensors by their names in its .safetensors files. Convolutions over single channels are matrices.

    framework   "np" for NumPy arrays, "pt" for torch tensors

    Raises UserError if a file is damaged, if two files hold the same name, or if there is no file.
    """

    def __init__(self, folder: Path, framework: Literal["np", "pt"]) -> None:
        self._folder, self._framework = folder, framework
        self._files: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        for path in sorted(folder.glob("[!.]*.safetensors")):
            with self._open(path) as file:
                stored = forms(file)
            for name in stored:
                if name in self._files:
                    first = self._files[name].name
                    raise UserError(f"{folder} holds {name} twice, in {first} and {path.name}.")
                self._files[name] = path
            self._shapes |= {name: as_matrix(shape) for name, (_, shape) in stored.items()}
            self._dtypes |= {name: dtype for name, (dtype, _) in stored.items()}
        if not self._files:
            raise UserError(f"{folder} has no .safetensors files.")

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __getitem__(self, name: str) -> Any:
        with self._open(self._file(name)) as file:
            return file.get_tensor(name).reshape(self._shapes[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading its data. Raises UserError if there is no such tensor."""
        self._file(name)
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Returns a tensor's dtype by safetensors' name, such as BF16. Raises UserError if there is no such tensor."""
        self._file(name)
        return self._dtypes[name]

    def _file(self, name: str) -> Path:
        if name not in self._files:
            raise UserError(f"{self._folder} has no tensor {name}.")
        return self._files[name]

    def _open(self, path: Path) -> AbstractContextManager[Any]:
        return open_tensors(path, self._framework, "Copy or download it again.")
