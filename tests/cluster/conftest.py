"""What tests of the cluster floor share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from kept_ray import KeptRay

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.tokenizer import Tokenizer

KEPT = ("local_cluster", "local_ray")
"""The fixtures that connect to a kept Ray."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules of one kind of Ray one after another, so that each kind is started once; those of none before them."""
    kinds = {path: _kind(items, path) for path in {item.path for item in items}}
    items.sort(key=lambda item: kinds[item.path])


def _kind(items: list[pytest.Item], path: Path) -> int:
    """What Ray the module at `path` uses: a place in KEPT, from 1 on, or 0."""
    used = {name for item in items if item.path == path for name in getattr(item, "fixturenames", ())}
    return next((kind for kind, name in enumerate(KEPT, 1) if name in used), 0)


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
    if not _kind(request.session.items, request.path):
        kept_ray.end()


@pytest.fixture(scope="module")
def local_cluster(kept_ray: KeptRay) -> None:
    """A Ray of four CPUs, which modules share: leave no actor, no placement group behind."""
    kept_ray.want(4)


@pytest.fixture(scope="module")
def local_ray(kept_ray: KeptRay) -> None:
    """A Ray of one CPU, which modules share: one worker process runs every task, and imports Quark once."""
    kept_ray.want(1)
