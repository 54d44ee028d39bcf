"""tensorstore specifications for folders on disk or in a bucket, and access to small files in these folders."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tensorstore as ts

from sophia_levanter.files import NotRegular, read_regular

# Retries for bucket requests. The delays grow to half a minute, so an unanswered request fails after two minutes.
_RETRIES = {"max_retries": 8}
# The codecs of arrays: no compression, and a checksum for each chunk.
CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def kvstore_spec(location: str) -> dict[str, Any] | str:
    """Return the tensorstore specification for a folder, given its path or a URL such as gs://bucket/folder.

    For `s3://` URLs, AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL selects a server other than Amazon's, and AWS_REGION or
    AWS_DEFAULT_REGION selects its region, as in Amazon's own tools. tensorstore itself does not read these variables.
    """
    folder = f"{location.rstrip('/')}/"
    scheme, separator, rest = folder.partition("://")
    if not separator:
        return {"driver": "file", "path": folder}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme != "s3" or not endpoint:
        return folder
    bucket, _, path = rest.partition("/")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return {"driver": "s3", "bucket": bucket, "path": path, "endpoint": endpoint, "aws_region": region}


def array_spec(location: str) -> dict[str, Any]:
    """Return the tensorstore specification for a zarr3 array, given the path or URL of its folder."""
    return {
        "driver": "zarr3",
        "kvstore": kvstore_spec(location),
        # A missing chunk is an error; by default it would read as zeros.
        "fill_missing_data_reads": False,
        "store_data_equal_to_fill_value": True,
    }


def context_spec(cache_bytes: int = 0) -> dict[str, Any]:
    """Return a `tensorstore.Context` specification with the given cache size and limited retries for buckets."""
    return {
        "cache_pool": {"total_bytes_limit": cache_bytes},
        "gcs_request_retries": _RETRIES,
        "s3_request_retries": _RETRIES,
    }


def read_file(location: str | Path, name: str) -> bytes | None:
    """Read a file in a folder. Return None if the file does not exist.

    Raises:
        NotRegular: if the file is not a regular file.
        ValueError: if the folder or the file cannot be read.
    """
    if "://" not in str(location):  # tensorstore would block on a named pipe
        try:
            return read_regular(Path(location, name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except NotRegular:
            raise
        except OSError as error:
            raise ValueError(str(error)) from error
    read = _store(location).read(name).result()
    return bytes(read.value) if read.state == "value" else None


def write_file(location: str | Path, name: str, content: bytes) -> None:
    """Write a file, creating its folder if needed. The file appears only once it is complete.

    Raises:
        ValueError: if the folder cannot be written.
    """
    _store(location).write(name, content).result()


def _store(location: str | Path) -> ts.KvStore:
    return ts.KvStore.open(kvstore_spec(str(location)), context=ts.Context(context_spec())).result()
