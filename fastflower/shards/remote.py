"""Addresses of shards that are not local, of any file system that fsspec knows."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastflower.errors import ArgumentError

_GIGABYTE = 1 << 30


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastflower"


@dataclass(frozen=True, slots=True, kw_only=True)
class Remote:
    """Shards at an address of fsspec's: s3://, gs://, https:// and others. A Loader takes one where it takes a folder."""

    url: str
    """Of the folder that `pack` wrote."""
    folder: str | Path = field(default_factory=_default_folder)
    """Where mirrors are kept, shared by all processes of a machine; ~/.cache/fastflower."""
    limit_bytes: int = 64 * _GIGABYTE
    """Of tars in it: those not used for longest make room, but for the shards of three windows."""
    options: dict[str, Any] = field(default_factory=dict)
    """What fsspec's file system is made with: storage_options, such as {"anon": True}."""


def remote(shards: "str | Path | Remote") -> Remote | None:
    """The shards as a Remote when they are not a local folder's."""
    if isinstance(shards, Remote):
        return shards
    scheme, found, _ = str(shards).partition("://")
    return Remote(url=str(shards)) if found and scheme != "file" else None


def file_system(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """fsspec's file system of an address, and the path in it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url, **options)
    except ImportError as error:
        raise ArgumentError(f"{url}: {error}; pip install 'fastflower[s3]', for gs:// [gcs], else [http].") from None
    except ValueError as error:
        raise ArgumentError(f"{url}: {error}; name a folder, or an address that fsspec knows.") from None
