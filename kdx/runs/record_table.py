"""Tables of an opened run as lists of dictionaries."""

from __future__ import annotations

from typing import Any

from kdx.disk import csv_text
from kdx.errors import KdxError


class Records(list[dict[str, Any]]):
    """A table as a list of dictionaries, one per row, all with the same keys."""

    def csv(self) -> str:
        """The table as CSV, with an empty field for None and NaN."""
        rows = ((None if value != value else value for value in row.values()) for row in self)
        return csv_text(list(self[0]) if self else [], map(list, rows))

    def frame(self) -> Any:
        """The table as a pandas.DataFrame. Raises KdxError if pandas is not installed; kdx does not need it otherwise."""
        try:
            import pandas  # type: ignore[import-untyped,import-not-found,unused-ignore]
        except ImportError as error:
            raise KdxError(
                "A data frame needs the package pandas, which is not installed.", "Install it with: pip install pandas"
            ) from error
        return pandas.DataFrame(list(self))
