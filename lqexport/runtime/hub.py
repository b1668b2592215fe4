"""Asks once, and quickly, whether the Hugging Face hub can be reached: its client retries for half a minute."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

LIMIT = 3.0
"""Seconds within which the hub must accept a connection."""


@contextlib.contextmanager
def hub() -> Iterator[str]:
    """Has the hub's client use its cache alone in the context if the hub cannot be reached.

    Yields what `no_hub` returns.
    """
    from huggingface_hub import constants

    before, reason = constants.HF_HUB_OFFLINE, no_hub()
    constants.HF_HUB_OFFLINE = bool(reason)
    try:
        yield reason
    finally:
        constants.HF_HUB_OFFLINE = before


def no_hub() -> str:
    """Returns a sentence on why the hub cannot be asked, or nothing if it can be."""
    from huggingface_hub import constants

    return "HF_HUB_OFFLINE is set." if constants.HF_HUB_OFFLINE else unreachable(constants.ENDPOINT)


def unreachable(endpoint: str, limit: float = LIMIT) -> str:
    """Returns a sentence on why no server accepts connections at a URL, or nothing if one does.

    limit   seconds to wait, for the name server too

    Behind a proxy nothing is asked: only the proxy may reach the server.
    """
    url = urlsplit(endpoint)
    proxies = urllib.request.getproxies()
    is_proxied = bool(proxies.get(url.scheme) or proxies.get("all"))
    if is_proxied and not urllib.request.proxy_bypass(url.netloc):
        return ""
    problems = ["it does not answer"]

    def connect() -> None:
        try:
            port = url.port or {"http": 80}.get(url.scheme, 443)
            socket.create_connection((url.hostname or "", port), limit).close()
            problems.clear()
        except (OSError, ValueError) as error:  # ValueError: the URL is none
            problems[:] = [getattr(error, "strerror", None) or str(error)]

    # In a thread, since a name server out of reach takes longer than the limit of the connection.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(limit)
    return f"{endpoint} cannot be reached ({problems[0]})." if problems else ""
