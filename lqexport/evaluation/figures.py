"""Formats measured numbers for the terminal, the report page and JSON."""

from __future__ import annotations

import math
from typing import Any


def with_error(value: float, error: float, digits: int = 4) -> str:
    """Returns a value with its error, such as `18.5523 ± 0.3712`; without the error if that is not finite."""
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.{digits}f} ± {error:.{digits}f}" if math.isfinite(error) else f"{value:.{digits}f}"


def figure(value: float) -> str:
    """Returns a value with four significant digits."""
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def share(value: float) -> str:
    """Returns a share from 0 to 1 in percent."""
    return f"{100 * value:.2f} %"


def finite_or_null(value: Any) -> Any:
    """Returns a JSON value with null in the place of every NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
