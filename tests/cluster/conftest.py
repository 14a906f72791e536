"""What tests of the cluster floor share."""

import pytest

from flyray.cluster.config import DEMO_MODEL
from flyray.cluster.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_MODEL)
