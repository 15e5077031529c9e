"""The S3 server of the tests, and the small run of the tests of runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.remote.server import Server, s3_server
from tests.runs.conftest import finished as finished
from tests.runs.conftest import folder as folder


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with s3_server() as server:
        yield server
