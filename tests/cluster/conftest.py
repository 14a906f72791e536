"""What tests of the cluster floor share."""

from collections.abc import Iterator

import pytest
import ray
from kept_ray import KeptRay

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.tokenizer import Tokenizer

KEPT = {"local_ray"}
"""The fixtures that connect to a kept Ray."""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_MODEL)


@pytest.fixture(scope="session")
def kept_ray() -> Iterator[KeptRay]:
    kept = KeptRay()
    yield kept
    kept.end()


@pytest.fixture(scope="module", autouse=True)
def no_ray_of_others(request: pytest.FixtureRequest, kept_ray: KeptRay) -> None:
    """A module that uses no kept Ray finds none."""
    used = {name for item in request.session.items if item.path == request.path for name in item.fixturenames}
    if not used & KEPT:
        kept_ray.end()


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[None]:
    """A Ray of four CPUs. A module's own, for its tests kill what runs in it."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def local_ray(kept_ray: KeptRay) -> None:
    """A Ray of one CPU, which modules share: one worker process runs every task, and imports Quark once."""
    kept_ray.want(1)
