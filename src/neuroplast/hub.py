"""Whether the Hugging Face hub can be reached."""

import socket
import urllib.request
from urllib.parse import urlsplit

from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE


def hub_answers() -> bool:
    """Asks for a connection once: the hub's own client would retry for half a minute before saying no."""
    if HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():
        return True  # a direct connection would say nothing about what the proxy reaches
    host = urlsplit(ENDPOINT)
    try:
        socket.create_connection((host.hostname, host.port or 443), timeout=5).close()
    except OSError:
        return False
    return True
