"""The tests of studies use one thread, since the number of threads is a part of a plan, and processes that tests start have one."""

from __future__ import annotations

from tests.distill.conftest import one_thread as one_thread
