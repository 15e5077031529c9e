"""Folders of data at URLs."""

from __future__ import annotations

import errno
from pathlib import Path

from kdx.errors import KdxError
from kdx.remote import RemotePath


def listed(folder: Path) -> Path:
    """A folder, with a listing of all its files if it is at a URL. It needs one request per 1,000 files instead of one or more per file.

    Raises KdxError for a bucket or a folder that does not exist, or that may not be listed.
    """
    if not isinstance(folder, RemotePath):
        return folder
    try:
        return folder.listed()
    except OSError as error:
        missing = error.errno == errno.ENOENT
        raise KdxError(
            f"{folder} cannot be listed: {error.strerror}.", "Check the bucket and the folder." if missing else "Check the permissions."
        ) from error
