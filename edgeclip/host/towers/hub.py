"""Reach a model hub, or say at once that it cannot be reached."""

import contextlib
import logging
import socket
import urllib.request
from collections.abc import Iterator
from urllib.parse import urlsplit

from edgeclip.errors import EdgeclipError

CONNECT_S = 5
"""seconds to wait for the hub's own port; its client would retry for a minute and log each time"""


@contextlib.contextmanager
def hub(wanted: bool) -> Iterator[None]:
    """Silence the hub's client inside, and switch it offline where the hub does not answer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    # The way through a proxy is its client's to find.
    proxied = urllib.request.getproxies().keys() & {"https", "all"}
    if wanted and not before and not proxied:
        url = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((url.hostname, url.port or 443), timeout=CONNECT_S).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        constants.HF_HUB_OFFLINE = before


def unreachable(weights: str, what: str, error: Exception) -> EdgeclipError:
    """Return the error for `weights` that are neither cached nor to be fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    kind, reason = type(error).__name__, " ".join(str(error).split())[:160]
    return EdgeclipError(
        f"weights {weights}",
        f"{what} is not in the local cache {HF_HUB_CACHE} and cannot be fetched ({kind}: {reason})",
        "fetch the file on a machine that reaches the hub and give its path: "
        "weights: /path/to/model.safetensors",
    )
