"""Refuses second moments of a linear's inputs, and targets made of them, that are NaN or infinite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from lqexport.errors import UserError
from lqexport.solver.cholesky import OVERFLOW


@contextlib.contextmanager
def inputs_of(name: str) -> Iterator[None]:
    """Names the linear in a UserError of the context, which works with the second moments of the linear's inputs."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{name}: {error}") from error


def check_target(target: Tensor) -> None:
    """Raises UserError if what a linear is solved for, computed from its inputs, is NaN or infinite."""
    if not bool(torch.isfinite(target).all()):
        raise UserError(OVERFLOW)


def check_moments(hessian: Tensor) -> None:
    """Raises UserError if the second moments of a linear's inputs, [C, C], are NaN or infinite."""
    if not bool(torch.isfinite(hessian.diagonal()).all()):
        raise UserError(OVERFLOW)
