"""Fits the windows of a protocol to the context of a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lqexport.errors import UserError
from lqexport.evaluation.protocols import Protocol
from lqexport.models.context import learned_positions, trained_positions

LEAST = 8
"""The fewest tokens of a window."""


def fitted(protocol: Protocol, config: dict[str, Any]) -> Protocol:
    """Returns the protocol with the longest windows that a model of this config.json can run on.

    Windows are shortened to the positions that the model has learned, and the protocol's name then has that length:
    `hf-1024`. The same share of a window is scored. A model that rotates queries and keys gets the protocol as it is.
    Raises UserError if the model has too few positions for any window.
    """
    positions = learned_positions(config)
    if positions is None or positions >= protocol.window:
        return protocol
    if positions < LEAST:
        raise UserError(f"The model has {positions} positions, and a window needs {LEAST} tokens.")
    first = protocol.first if protocol.first == 1 else positions // 2 + 1
    return replace(protocol, name=f"{protocol.name.rpartition('-')[0]}-{positions}", window=positions, first=first)


def window_warnings(protocol: Protocol, config: dict[str, Any]) -> list[str]:
    """Returns a sentence if the windows of a protocol are longer than the context of a model; else nothing."""
    fitting, trained = fitted(protocol, config), trained_positions(config)
    if fitting != protocol:
        return [
            f"The model has {fitting.window} positions, so its windows have {fitting.window} tokens instead of the "
            f"{protocol.window} of {protocol.name}. The numbers of {fitting.name} do not compare with those of "
            f"{protocol.name}."
        ]
    if trained is not None and trained < protocol.window:
        return [
            f"The model was trained on {trained} positions (max_position_embeddings), and the windows of "
            f"{protocol.name} have {protocol.window} tokens, so its predictions may be poor in most of a window."
        ]
    return []
