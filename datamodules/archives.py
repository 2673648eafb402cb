"""Unpack archives that nobody vouches for: what they hold may not leave the folder, nor fill the disk."""

import errno
import gzip
import posixpath
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import IO, NamedTuple

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
# What an archive may hold: far more than the largest set needs, and far less than hurts.
MAX_MEMBERS = 1_000_000
MAX_RATIO = 100  # unpacked to packed size
SLACK = 2**28  # bytes beyond the ratio, for small archives
TOO_LARGE = "it unpacks to more than {:,} bytes"
# What the system says to the names and offsets of a damaged archive; None: it is the library that says it.
DAMAGE = (None, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ENAMETOOLONG)
CHUNK = 2**20  # bytes


def require_room(folder: Path, size: int, name: str) -> None:
    """Raise an ``OSError`` where the disk of the folder has no room for so many bytes more."""
    if size > (free := shutil.disk_usage(folder).free):
        raise OSError(errno.ENOSPC, f"{name} needs {size:,} bytes, and {folder} has room for {free:,}")


class _Member(NamedTuple):
    """What an archive holds under a name: the bytes of a file, another name of a file (``link``), or else a folder."""

    name: str
    size: int = 0
    content: IO[bytes] | None = None
    link: str | None = None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack an archive into a folder without links; links to files of the archive become hard links.

    Raises:
        ValueError: it is damaged, encrypted or too large, or a member is unsafe; the archive is deleted.
        OSError: the disk has no room.
    """
    read = _zip_members if archive.name.lower().endswith(".zip") else _tar_members
    links = []
    try:
        for count, member in enumerate(read(archive, archive.stat().st_size * MAX_RATIO + SLACK), 1):
            if count > MAX_MEMBERS:
                raise ValueError(f"it has more than {MAX_MEMBERS:,} members")
            path = folder / _inside(member.name)
            if member.link is not None:
                links.append((path, folder / _inside(member.link)))
            elif member.content is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                require_room(folder, member.size, path.name)
                path.parent.mkdir(parents=True, exist_ok=True)
                with member.content, path.open("xb") as file:
                    shutil.copyfileobj(member.content, file, CHUNK)
        for path, file_of_archive in links:  # last, so that nothing is ever written through one
            if not file_of_archive.is_file():
                raise ValueError(f"{path.name} is a link to {file_of_archive.name}, which is no file of it")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(file_of_archive)
    except Exception as error:  # a damaged archive raises nearly any type
        if isinstance(error, OSError) and error.errno not in DAMAGE:
            raise
        archive.unlink()
        raise ValueError(f"{archive.name} is damaged or unsafe, and was deleted: {error}") from error


def _inside(name: str) -> Path:
    r"""Read the name of a member as a path that stays below the folder, whatever system it was written on.

    >>> _inside("images\\1.png").as_posix()
    'images/1.png'
    """
    path = PureWindowsPath(name)  # knows both slashes, and drives
    if path.anchor or ".." in path.parts:
        raise ValueError(f"{name!r} would lie outside of the folder")
    return Path(*path.parts)


def _zip_members(archive: Path, limit: int) -> Iterator[_Member]:
    with zipfile.ZipFile(archive) as file:
        if sum(info.file_size for info in file.infolist()) > limit:
            raise ValueError(TOO_LARGE.format(limit))
        for info in file.infolist():
            if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise ValueError(f"{info.filename!r} is neither a file nor a folder")
            yield _Member(info.filename, info.file_size, None if info.is_dir() else file.open(info))


def _tar_members(archive: Path, limit: int) -> Iterator[_Member]:
    unpacked = archive.open("rb") if archive.name.lower().endswith(".tar") else _BoundedGzip(archive, limit)
    # As a stream: all that is read counts, headers too, and no member can send the reader back to read it again.
    with unpacked, tarfile.open(fileobj=unpacked, mode="r|") as file:
        for member in file:
            if member.isdir():
                yield _Member(member.name)
            elif member.isreg() and not member.issparse():
                yield _Member(member.name, member.size, file.extractfile(member))
            elif member.islnk():
                yield _Member(member.name, link=member.linkname)
            elif member.issym():
                beside = posixpath.join(posixpath.dirname(member.name), member.linkname)
                yield _Member(member.name, link=posixpath.normpath(beside))
            else:
                raise ValueError(f"{member.name!r} is neither a file nor a folder nor a link")
        # tarfile takes a damaged or missing header for the end, which is a block of zeros; gzip verifies what it read
        # only when all is read.
        if file.fileobj.tell() < file.offset + tarfile.BLOCKSIZE:
            raise ValueError("its end is missing")
        while rest := file.fileobj.read(CHUNK):
            if rest.strip(b"\0"):
                raise ValueError("there is more after its end")


class _BoundedGzip(gzip.GzipFile):
    """A compressed file that raises a ``ValueError`` where it unpacks to more than ``limit`` bytes."""

    def __init__(self, path: Path, limit: int) -> None:
        super().__init__(path, "rb")
        self.limit = limit

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        if self.tell() > self.limit:
            raise ValueError(TOO_LARGE.format(self.limit))
        return data
