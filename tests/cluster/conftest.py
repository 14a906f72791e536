"""What tests of the cluster floor share."""

from collections.abc import Iterator

import pytest
import ray

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[None]:
    """A Ray of four CPUs. A module's own, for other modules start theirs in other ways."""
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
