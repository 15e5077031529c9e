"""A browser for the page of a study."""

from __future__ import annotations

from tests.browser import browser as browser
from tests.browser import opened as opened
