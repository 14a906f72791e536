"""Connecting to a Ray cluster that somebody else started."""

from __future__ import annotations

import logging
import socket

_TIMEOUT_S = 5.0


class RayAddressError(Exception):
    """There is no Ray cluster at the address; the message says what would be right."""


def connect(address: str) -> None:
    """Connects `ray` to the cluster at `address`: host:port of its head, or "auto".

    Raises RayAddressError, at once where nothing listens: Ray itself would try for more than a minute, deaf to signals.
    """
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdigit():
        _probe(address, host.strip("[]"), int(port))
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError) as error:
        raise RayAddressError(f"ray.address: no Ray cluster at {address}: {error}") from error


def _probe(address: str, host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), _TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        raise RayAddressError(
            f"ray.address: nothing answers at {address} ({error}); "
            "give the host:port of a running cluster's head, or 'local' to start a cluster on this machine"
        ) from None
