"""What tests of the actors floor share."""

from collections.abc import Iterator

import pytest

from flyray.actors.socket_folder import SocketFolder


@pytest.fixture
def socket_folder() -> Iterator[str]:
    with SocketFolder() as folder:
        yield folder
