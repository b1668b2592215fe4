"""Quantize language models inside the exact grid of their target file, export and verify them."""

from importlib.metadata import version

__version__ = version("lqexport")
