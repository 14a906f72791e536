"""One Ray for several test modules: starting it, and what its workers import, are what takes time."""

from __future__ import annotations

import logging
import os
import secrets

# Ray would keep a token for all its clusters in the home folder, where two test processes that find none write two.
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import ray


class KeptRay:
    """At most one Ray of this process, left running between modules that want as many CPUs."""

    def __init__(self) -> None:
        self._cpus = 0

    def want(self, cpus: int) -> None:
        """Connects `ray` to a Ray of so many CPUs, one that stands if it has them."""
        if cpus == self._cpus and ray.is_initialized():
            return
        self.end()
        options = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
        ray.init(address="local", num_cpus=cpus, **options)
        self._cpus = cpus

    def end(self) -> None:
        """For modules that start a Ray in other ways, or want none."""
        if self._cpus:
            ray.shutdown()
        self._cpus = 0
