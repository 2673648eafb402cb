"""Get public data: download, resume, verify, unpack, and put a folder into place only when all of it is there.

While ``<folder>`` is not complete, everything lies in ``<folder>.part`` beside it: files that are there in part
(``.partial``), files that are there as a whole, and what is unpacked from them.
"""

import fcntl
import hashlib
import http.client
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from datamodules.archives import ARCHIVES, require_room, unpack

USER_AGENT = "ood-suite/0.1"
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # requests for one file in one call
WAIT = 1.0  # seconds before the next request
CHUNK = 2**20  # bytes

Report = Callable[[int, int | None], None]


@dataclass(frozen=True)
class Download:
    """A file to download.

    Attributes:
        url: http or https; the last part of its path names the file.
        checksum: ``sha256:<hex>`` or ``md5:<hex>`` where one is known.
    """

    url: str
    checksum: str | None = None

    def __post_init__(self) -> None:
        if urlsplit(self.url).scheme not in ("http", "https") or not self.name:
            raise ValueError(f"a download is an http or https url of a file, not {self.url}")
        if self.checksum and not re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{32}", self.checksum):
            raise ValueError(f"{self.url}: a checksum is sha256:<64 hex digits> or md5:<32>, not {self.checksum}")

    @property
    def name(self) -> str:
        """Name of the file."""
        return PurePosixPath(urlsplit(self.url).path).name


def fetch(downloads: Sequence[Download], folder: Path) -> None:
    """Download files, unpack archives, and put the folder into place when all of it is there.

    What was downloaded before an error or an interruption stays in ``<folder>.part``, and the next call continues it.

    Raises:
        FileExistsError: there is a folder already; it is left alone.
        BlockingIOError: another process is getting the same.
        ConnectionError: the server cannot be reached, refuses, or cuts the connection again and again.
        ValueError: a file is not what it should be, or an archive is damaged or unsafe; it is deleted.
        OSError: the disk has no room.
    """
    names = [download.name for download in downloads]
    if len(set(names)) < len(names):
        raise ValueError(f"files of one folder need names of their own, these are {', '.join(names)}")
    with _unfinished(folder) as content:
        for file in [_download(download, content.parent) for download in downloads]:
            if file.name.lower().endswith(ARCHIVES):
                print(f"unpacking {file.name}", file=sys.stderr)
                unpack(file, content)
            else:
                file.rename(content / file.name)


def install(get: Callable[[Path], object], folder: Path) -> None:
    """Let a function download into an empty folder, and put that into place when it returns.

    Nothing is kept when it fails: such functions may take for complete what they once began.

    Raises:
        FileExistsError: there is a folder already; it is left alone.
        BlockingIOError: another process is getting the same.
    """
    with _unfinished(folder) as content:
        try:
            get(content)
        except (RuntimeError, URLError) as error:  # so torchvision says that a file is another one than it should be
            where = f" ({error.url})" if isinstance(error, HTTPError) else ""
            raise ConnectionError(f"{folder.name} cannot be downloaded: {error}{where}") from error


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Yield an empty folder in ``<folder>.part``, which becomes ``folder`` if the block succeeds, else nothing."""
    part = folder.with_name(f"{folder.name}.part")
    content = part / ".content"
    _refuse_existing(folder)
    part.mkdir(parents=True, exist_ok=True)
    with (part / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is filling {part}: wait for it, or stop it") from None
        _refuse_existing(folder)  # that process may just have finished
        shutil.rmtree(content, ignore_errors=True)  # left by one that was killed
        content.mkdir()
        try:
            yield content
            content.rename(folder)
        except BaseException:
            shutil.rmtree(content, ignore_errors=True)
            if not any(path for path in part.iterdir() if path.name != ".lock" and path.suffix != ".validator"):
                shutil.rmtree(part, ignore_errors=True)  # there is nothing to go on with
            raise
        # Another process may open the lock meanwhile; it then finds the folder in place.
        shutil.rmtree(part, ignore_errors=True)


def _refuse_existing(folder: Path) -> None:
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already and is left as it is; remove it to get it anew")


def _download(download: Download, part: Path) -> Path:
    """Return the file, complete and verified."""
    file, partial = part / download.name, part / f"{download.name}.partial"
    if not file.exists():
        with _reporting(download) as report:
            _complete(download, partial, report)
        partial.rename(file)
    try:
        _verify(file, download)
    except ValueError:
        file.unlink()
        raise
    return file


@contextmanager
def _reporting(download: Download) -> Iterator[Report]:
    """Yield a function that shows how many bytes are there, and of how many; where nobody looks, print one line."""
    if not sys.stderr.isatty():
        print(f"downloading {download.url}", file=sys.stderr)
        yield lambda done, total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(download.name, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _complete(download: Download, partial: Path, report: Report) -> None:
    """Request the file until all of it is there, as long as each request brings something."""
    for attempt in range(1, ATTEMPTS + 1):
        before = _size(partial)
        try:
            _receive(download, partial, report)
            return
        except ConnectionError as error:
            if attempt == ATTEMPTS or _size(partial) == before:
                raise ConnectionError(f"{download.url}: {error}") from error
        time.sleep(WAIT)


def _receive(download: Download, partial: Path, report: Report) -> None:
    """Make one request, for what the partial file lacks; ``ConnectionError`` where that does not complete it."""
    validator = partial.with_suffix(".validator")
    version = validator.read_text("latin-1") if validator.exists() else ""
    begun = _size(partial) if version else 0
    headers = {"Range": f"bytes={begun}-", "If-Range": version} if begun else {}
    with _open(download.url, headers) as response:
        if response.status not in (200, 206, 416):
            raise ConnectionError(f"the server answers {response.status} {response.reason}")
        if response.status == 200:
            if response.headers.get_content_type() == "text/html":
                raise ValueError(_web_page(download))
            total, begun = response.length, 0
            partial.unlink(missing_ok=True)
            validator.write_text(_version(response), "latin-1")
            if total is None and not response.chunked and download.checksum is None:
                raise ConnectionError("the server does not say how long the file is, so a cut would go unnoticed")
        elif (total := _continued(response, begun, version)) is None:
            partial.unlink(missing_ok=True)
            raise ConnectionError("the server cannot continue the file that was begun; it is to be started anew")
        lacking = None if total is None else total - begun
        require_room(partial.parent, lacking or 0, download.name)
        with partial.open("ab") as file:
            for chunk in _body(response, lacking):
                file.write(chunk)
                begun += len(chunk)
                if total is not None and begun > total:
                    partial.unlink()
                    raise ValueError(f"{download.url} sends more than the {total:,} bytes that it announced")
                report(begun, total)


def _open(url: str, headers: dict[str, str]) -> Any:
    """Return the response, whatever its status. Unlike urllib's own opener, this one knows http and https alone."""
    opener = request.OpenerDirector()
    web = (request.HTTPHandler, request.HTTPSHandler, request.HTTPRedirectHandler, request.UnknownHandler)
    for handler in (*web, request.ProxyHandler, request.HTTPErrorProcessor, request.HTTPDefaultErrorHandler):
        opener.add_handler(handler())
    try:
        return opener.open(request.Request(url, headers={"User-Agent": USER_AGENT} | headers), timeout=TIMEOUT)
    except HTTPError as response:
        return response
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"the server cannot be reached: {getattr(error, 'reason', error)}") from error


def _version(response: http.client.HTTPResponse) -> str:
    """Return what tells this version of the file from others, as far as the server says; weak tags may not."""
    etag = response.headers["ETag"] or "W/"
    return (response.headers["Last-Modified"] or "") if etag.startswith("W/") else etag


def _continued(response: http.client.HTTPResponse, begun: int, version: str) -> int | None:
    """Return the length of the whole file if the response continues the one begun, else ``None``."""
    told = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", response.headers["Content-Range"] or "")
    same = begun and response.status == 206 and _version(response) in ("", version)
    return int(told[2]) if same and told and int(told[1]) == begun else None


def _body(response: http.client.HTTPResponse, length: int | None) -> Iterator[bytes]:
    """Yield the body in pieces, all that comes; ``ConnectionError`` where that is less than ``length`` bytes."""
    response.length = None  # or http.client would stop there, and hide that there is more
    received = 0
    while True:
        try:
            chunk = response.read1(CHUNK)
        except (OSError, http.client.HTTPException) as error:
            if received == length:  # all is there, only the connection was not closed
                return
            raise ConnectionError(
                f"the connection was cut ({str(error) or type(error).__name__}); try again to go on"
            ) from error
        received += len(chunk)
        if length is not None and received < length and not chunk:
            raise ConnectionError(f"the connection was cut after {received:,} of {length:,} bytes; try again to go on")
        if not chunk:
            return
        yield chunk


def _verify(file: Path, download: Download) -> None:
    """Raise a ``ValueError`` where the file is not what it should be."""
    with file.open("rb") as stream:
        if re.match(rb"\s*<(!doctype html|html)", stream.read(100), re.IGNORECASE):
            raise ValueError(_web_page(download))
        if download.checksum is not None:
            algorithm, expected = download.checksum.split(":")
            stream.seek(0)
            found = hashlib.file_digest(stream, algorithm).hexdigest()
            if found != expected:
                raise ValueError(
                    f"{download.url} is another file than it should be, and was deleted: expected {algorithm} "
                    f"{expected}, found {found}"
                )


def _web_page(download: Download) -> str:
    return (
        f"{download.url} answers with a web page instead of {download.name}; open it in a browser: the file may have "
        "moved, the page may ask for something, or too many may have fetched it today"
    )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
