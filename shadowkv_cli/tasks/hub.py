"""The Hugging Face hub: whether it can be reached, and working without it."""

from __future__ import annotations

import socket
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

PROBE_TIMEOUT_S = 5.0


@cache
def hub_reachable() -> bool:
    """Whether a connection to the hub can be opened.

    Its clients try again for half a minute and print every attempt; this answers at once where
    there is no network. Behind a proxy the answer is yes, since only the proxy knows.
    """
    from huggingface_hub import constants

    endpoint = urlsplit(constants.ENDPOINT)
    if endpoint.hostname is None or urllib.request.getproxies():
        return True
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname, port), timeout=PROBE_TIMEOUT_S):
            return True
    except OSError:
        return False


@contextmanager
def hub_access(offline: bool) -> Iterator[bool]:
    """Yield whether the hub may be asked; where not, the clients use their caches without trying.

    Not, if `offline` says so or there is no network.
    """
    from huggingface_hub import constants

    if not offline and hub_reachable():
        yield True
        return
    before = constants.HF_HUB_OFFLINE
    # `datasets` copies the constant when it is imported.
    data_config = sys.modules.get("datasets.config")
    data_before = getattr(data_config, "HF_HUB_OFFLINE", None)
    constants.HF_HUB_OFFLINE = True
    if data_config is not None:
        data_config.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield False
    finally:
        constants.HF_HUB_OFFLINE = before
        if data_config is not None:
            data_config.HF_HUB_OFFLINE = data_before  # type: ignore[attr-defined]
