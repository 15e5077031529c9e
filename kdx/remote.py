"""Paths of files at URLs such as ``s3://bucket/run``, through fsspec.

Credentials and endpoints come from fsspec's configuration and from the standard environment variables, such as AWS_ACCESS_KEY_ID and
AWS_ENDPOINT_URL. Their packages are in the extra ``cloud``.
"""

from __future__ import annotations

import errno
import fnmatch
import io
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any, TypeVar

from kdx.errors import KdxError, first_line, import_optional

ResultT = TypeVar("ResultT")

_ATTEMPTS = 3
_SECONDS_BETWEEN_ATTEMPTS = 0.5

_BLOCK_BYTES = 1 << 20
"""The bytes that reading a file in parts requests at least."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CREDENTIALS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://)(?:[^/@\s]*|[^/@:\s]*:(?!\d+/)[^@\s]*)@")
"""User and password before an @. Keys of S3 can contain slashes; after a colon a number and a slash are a port and a path."""
_QUERY = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://[^?\s]*)\?[\w.%-]+=\S*")
"""A query has NAME=VALUE. In other places a question mark belongs to a pattern of names."""


def is_url(place: str | Path) -> bool:
    """Whether a place is a URL of a file system and not a path on this machine."""
    return isinstance(place, RemotePath) or _URL.match(str(place)) is not None


def as_path(place: str | Path) -> Path:
    """The path of a place: a `RemotePath` for a URL, otherwise a path on this machine."""
    if isinstance(place, RemotePath):
        return place
    return RemotePath(without_credentials(str(place))) if is_url(place) else Path(place)


def local_path(path: Path) -> Path:
    """The value of an option that names a folder on this machine. Raises KdxError for a URL, which would become a folder ``s3:``."""
    if path.parts and re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]+:", path.parts[0]):
        raise KdxError(f"{path} is a URL, and this command writes into a local folder.", "Give a local --out.")
    return path


def without_credentials(text: str) -> str:
    """``text`` without the user names, passwords and queries of its URLs, which can contain credentials."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub(r"\1", text))


@dataclass(frozen=True)
class RemoteFile:
    """A file in a listing. version: its ETag, or another text that the service changes with the content; "" if the service has none."""

    size: int
    version: str


@dataclass(frozen=True)
class _Listing:
    """The files below a folder, by their path relative to it, and the names in each folder ("" is the folder itself)."""

    files: dict[str, RemoteFile]
    folders: dict[str, list[str]]


@dataclass(frozen=True)
class RemoteStat:
    """The part of a file's status that kdx uses."""

    st_size: int


class RemotePath(Path, PurePosixPath):
    """A path at a URL, with the methods of `pathlib.Path` that kdx uses on runs and data sets.

    Writing a file is atomic: an object appears whole or not at all. Folders exist as long as they contain files, and ``mkdir`` does
    nothing. Other methods of `Path` raise TypeError and never use the local disk, because ``os.fspath`` refuses the path.

    As those of `Path`, methods raise OSError for a file that is missing or that exists already. They raise KdxError for a service that
    refuses access, and after a few attempts for one that cannot be reached.
    """

    __slots__ = ("_listing", "_listing_root")

    _listing: _Listing
    _listing_root: str

    def __str__(self) -> str:
        first, *rest = self.parts or (".",)
        return f"{first}//{'/'.join(rest)}" if first.endswith(":") else "/".join((first, *rest))

    def __fspath__(self) -> str:
        raise TypeError(f"{self} is not a path on this machine")

    def __truediv__(self, key: Any) -> RemotePath:
        return self._of_listing(super().__truediv__(key))

    @property
    def parent(self) -> RemotePath:
        return self._of_listing(super().parent)

    def _of_listing(self, path: Path) -> RemotePath:
        """A path derived from this one, with the same listing."""
        derived = path if isinstance(path, RemotePath) else RemotePath(path)
        with suppress(AttributeError):
            derived._listing, derived._listing_root = self._listing, self._listing_root
        return derived

    def listed(self) -> RemotePath:
        """This folder with a listing of everything below it. For paths that are derived from it with ``/``, ``iterdir`` and
        ``rglob``, the existence, size and version of files need no further request.

        Raises FileNotFoundError if there are no such files.
        """
        base = self._file_system()._strip_protocol(str(self)).rstrip("/")
        entries: dict[str, dict[str, Any]] = self._call(lambda system: system.find(str(self), detail=True, withdirs=False))
        files: dict[str, RemoteFile] = {}
        folders: dict[str, set[str]] = {"": set()}
        for name, entry in entries.items():
            key = name.removeprefix(base).strip("/")
            if not key or name.endswith("/") or entry.get("type") == "directory":
                continue
            files[key] = RemoteFile(int(entry.get("size") or 0), _version(entry))
            while key:
                folder, _, last = key.rpartition("/")
                known = last in folders.setdefault(folder, set())
                folders[folder].add(last)
                if known:
                    break
                key = folder
        if not files:
            raise FileNotFoundError(errno.ENOENT, "There are no files")
        path = RemotePath(self)
        path._listing_root, path._listing = str(path), _Listing(files, {name: sorted(names) for name, names in folders.items()})
        return path

    @property
    def file(self) -> RemoteFile:
        """The size and the version of this file. Raises FileNotFoundError if there is no such file."""
        known = self._known()
        if known is not None:
            listing, key = known
            if key not in listing.files:
                raise FileNotFoundError(errno.ENOENT, "No such file", str(self))
            return listing.files[key]
        entry = self._call(lambda system: system.info(str(self)))
        if entry.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "Is a directory", str(self))
        return RemoteFile(int(entry.get("size") or 0), _version(entry))

    def stat(self, *, follow_symlinks: bool = True) -> RemoteStat:  # type: ignore[override]
        return RemoteStat(self.file.size)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        known = self._known()
        if known is not None:
            return known[1] in known[0].files or known[1] in known[0].folders
        return bool(self._call(lambda system: system.exists(str(self))))

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        known = self._known()
        return known[1] in known[0].files if known is not None else bool(self._call(lambda system: system.isfile(str(self))))

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        known = self._known()
        return known[1] in known[0].folders if known is not None else bool(self._call(lambda system: system.isdir(str(self))))

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[RemotePath]:  # type: ignore[override]
        known = self._known()
        if known is not None:
            names = known[0].folders.get(known[1], [])
        else:
            entries = self._call(lambda system: system.ls(str(self), detail=False))
            names = [name for name in (str(entry).rstrip("/").rpartition("/")[2] for entry in entries) if name != self.name]
        return (self / name for name in names)

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """The entries of this folder whose names match; none if the folder does not exist."""
        with suppress(FileNotFoundError, NotADirectoryError):
            yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """The files below this folder whose names match."""
        known = self._known()
        if known is None:
            with suppress(FileNotFoundError):
                yield from self.listed().rglob(pattern)
            return
        listing, key = known
        pending = [key]
        while pending:
            folder = pending.pop()
            for name in listing.folders.get(folder, []):
                place = f"{folder}/{name}" if folder else name
                if place in listing.folders:
                    pending.append(place)
                elif fnmatch.fnmatchcase(name, pattern):
                    yield self._of_listing(RemotePath(f"{self._listing_root}/{place}"))

    def open(self, mode: str = "r", *_: Any, encoding: str | None = None, newline: str | None = None, **__: Any) -> IO[Any]:  # type: ignore[override]
        """Open the file for reading: as text at once, or as bytes in blocks (``rb``)."""
        if mode == "rb":
            stream: IO[Any] = self._call(lambda system: system.open(str(self), "rb", block_size=_BLOCK_BYTES))
            return stream
        if mode != "r":
            raise ValueError(f"no mode {mode!r} for a file at a URL")
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding=encoding or "utf-8", newline=newline)

    def read_bytes(self) -> bytes:
        size = 0 if self._known() is None else self.file.size
        if size:  # without a size, s3fs requests it first
            return self.read_range(0, size)
        content: bytes = self._call(lambda system: system.cat_file(str(self)))
        return content

    def read_range(self, start: int, stop: int) -> bytes:
        """The bytes from ``start`` to ``stop``, in one request."""
        content: bytes = self._call(lambda system: system.cat_file(str(self), start=start, end=stop))
        return content

    def read_text(self, encoding: str | None = None, errors: str | None = None, newline: str | None = None) -> str:
        return self.read_bytes().decode(encoding or "utf-8", errors or "strict")

    def write_bytes(self, data: Any) -> int:
        """Write the file as a whole, in place of an older one."""
        self._call(lambda system: system.pipe_file(str(self), bytes(data)))
        return len(data)

    def create(self, data: bytes) -> None:
        """Write a file that does not exist. Raises FileExistsError if it does; on S3 and Google Cloud Storage only one of several processes
        succeeds."""
        try:
            self._call(lambda system: system.pipe_file(str(self), data, mode="create"))
        except OSError as error:
            if "PreconditionFailed" in repr(error.__cause__) or "condition" in str(error):  # s3fs has no FileExistsError for it
                raise FileExistsError(errno.EEXIST, "The file exists", str(self)) from error
            raise

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: folders exist as long as they contain files."""

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            self._call(lambda system: system.rm_file(str(self)))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def remove_tree(self) -> None:
        """Delete everything below this folder, if there is anything."""
        with suppress(FileNotFoundError):
            self._call(lambda system: system.rm(str(self), recursive=True))

    def resolve(self, strict: bool = False) -> RemotePath:
        return self

    def absolute(self) -> RemotePath:
        return self

    def expanduser(self) -> RemotePath:
        return self

    def _known(self) -> tuple[_Listing, str] | None:
        """The listing that contains this path, and the path in it; None without one."""
        try:
            return self._listing, str(self).removeprefix(self._listing_root).strip("/")
        except AttributeError:
            return None

    def _file_system(self) -> Any:
        return _file_system(self.parts[0].removesuffix(":"), self.parts[1] if len(self.parts) > 1 else "", os.getpid())

    def _call(self, request: Callable[[Any], ResultT]) -> ResultT:
        """The result of ``request(file_system)``. Retries after a lost connection. Every exception becomes an OSError or a KdxError."""
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                return request(self._file_system())
            except KdxError:
                raise
            except Exception as error:
                if not _is_lost_connection(error) or attempt == _ATTEMPTS:
                    raise _failure(self, error) from error
                time.sleep(_SECONDS_BETWEEN_ATTEMPTS * attempt)
        raise AssertionError


def zarr_store(path: Path, *, read_only: bool) -> Any:
    """The store that Zarr opens for the arrays in a folder: the path, or a store at the URL."""
    if not isinstance(path, RemotePath):
        return path
    import_optional("fsspec", "cloud", f"The run at {path}")
    from zarr.storage import FsspecStore

    return FsspecStore.from_url(str(path), storage_options={"use_listings_cache": False}, read_only=read_only)


@contextmanager
def remote_errors(path: Path) -> Iterator[None]:
    """Turn every exception of a service in the block into an OSError or a KdxError, if ``path`` is at a URL."""
    try:
        yield
    except Exception as error:
        if isinstance(error, KdxError) or not isinstance(path, RemotePath) or not _is_from_service(error):
            raise
        raise _failure(path, error) from error


def _failure(path: Path, error: Exception) -> Exception:
    """The error to raise for an exception of a service."""
    names = {kind.__name__ for kind in type(error).__mro__}
    code = next((code for kind, code in _FILE_ERRORS.items() if isinstance(error, kind)), None)
    if code is not None:
        return OSError(code, reason if " " in (reason := _reason(error)) else os.strerror(code), str(path))
    if names & _CREDENTIAL_ERRORS or isinstance(error, PermissionError):
        return KdxError(
            f"The service refuses access to {path}: {_reason(error)}.",
            "Set the service's credentials, for S3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, with permission to list, read and write.",
        )
    if _is_lost_connection(error):
        return KdxError(
            f"The connection to {path} fails: {_reason(error)}.", "Check the network and the endpoint, then run the same command again."
        )
    if isinstance(error, OSError):
        return OSError(error.errno or errno.EIO, _reason(error), str(path))
    return KdxError(f"{path} cannot be used: {_reason(error)}.", "Check the URL and the configuration of its file system.")


def _is_from_service(error: Exception) -> bool:
    """Whether an exception is of the system, or of a package that talks to a service."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, OSError) or package in _PACKAGES


_PACKAGES = {"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "fsspec", "huggingface_hub", "httpx", "httpx2"}


_FILE_ERRORS = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    IsADirectoryError: errno.EISDIR,
    NotADirectoryError: errno.ENOTDIR,
}
"""Exceptions about a file with their numbers, from which OSError makes the same exception again."""

_CREDENTIAL_ERRORS = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError", "GatedRepoError"}

_CONNECTION_ERRORS = {"HTTPClientError", "ConnectionError", "ClientConnectionError", "ClientPayloadError", "TimeoutError"} | {
    "ReadTimeout",  # of requests
    "TransportError",  # of httpx, with which huggingface_hub sends its requests
}


def _is_lost_connection(error: Exception) -> bool:
    return bool({kind.__name__ for kind in type(error).__mro__} & _CONNECTION_ERRORS)


def _reason(error: Exception) -> str:
    return without_credentials((error.strerror if isinstance(error, OSError) else None) or first_line(error))


def _version(entry: dict[str, Any]) -> str:
    for key in ("ETag", "etag", "checksum", "blob_id", "md5Hash"):
        if entry.get(key):
            return str(entry[key]).strip('"')
    return ""


@lru_cache(maxsize=16)
def _file_system(protocol: str, host: str, process: int) -> Any:
    """The file system of a protocol and a host or bucket in this process. A forked process needs its own, because processes cannot
    share connections."""
    fsspec = import_optional("fsspec", "cloud", f"A {protocol}:// URL")
    try:
        return fsspec.url_to_fs(f"{protocol}://{host}", use_listings_cache=False)[0]
    except ImportError as error:
        raise KdxError(
            f"{protocol}:// URLs need another package: {first_line(error)}.", "Install it, or pip install 'kdx[cloud]'."
        ) from error
    except ValueError as error:
        raise KdxError(f"{protocol}:// is not a protocol that fsspec knows: {first_line(error)}.", "Check the URL.") from error
