"""Registers the native format with transformers, at once if transformers is imported, else when it is imported.

transformers does not look for plugins. Importing it takes seconds, so `import lqexport` and `lqexport --help` must not
import it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

MODULE = "transformers.quantizers.auto"


def register() -> None:
    """Imports the plugin now if transformers' registry is imported, else directly after it is imported."""
    if MODULE in sys.modules:
        import lqexport.integration.transformers_plugin  # noqa: F401
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Finds transformers' registry in the usual way, and makes its loader import the plugin afterwards."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads a module with its usual loader, then imports the plugin."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import lqexport.integration.transformers_plugin  # noqa: F401
