"""The downloader against a local server that can do all that servers do wrong."""

import gzip
import hashlib
import io
import os
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from datamodules import archives, download
from datamodules.download import Download, fetch, install

BODY = random.Random(0).randbytes(300_000)
ROOT = Path(__file__).resolve().parents[2]


class Server(ThreadingHTTPServer):
    """Serves one body under every path.

    Attributes:
        cuts: after how many bytes of the body each of the next connections ends; ``None``: not at all.
        reset: whether it then ends with an error, rather than quietly.
        lie: how much more than there is the header announces; ``None``: it announces nothing.
        ranges: whether ranges are known: as they should be, not at all, not satisfiable, or shifted by a byte.
        stall: where given, the connections that are to be cut wait for it instead.
        ranges_asked, paths, agents, sent: what was asked for, by whom, and how many bytes of bodies went out.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.version, self.status, self.location = BODY, {"ETag": '"1"'}, 200, None
        self.content_type, self.cuts, self.reset, self.lie, self.ranges = (
            "application/octet-stream",
            [],
            False,
            0,
            "yes",
        )
        self.chunked, self.stall = False, None
        self.ranges_asked, self.paths, self.agents, self.sent = [], [], set(), 0
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.ranges_asked.append(asked)
        server.paths.append(self.path)
        server.agents.add(self.headers["User-Agent"])
        if server.location and self.path != "/moved.npy":
            return self.answer(302, {"Location": server.location, "Content-Length": "0"}, b"")
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges != "ignored" else 0
        if start and server.version and self.headers["If-Range"] not in server.version.values():
            start = 0
        if start and (server.ranges == "unsatisfiable" or start >= len(server.body)):
            return self.answer(416, {"Content-Range": f"bytes */{len(server.body)}", "Content-Length": "0"}, b"")
        first = start + (bool(start) and server.ranges == "shifted")
        body = server.body[first:]
        headers = {"Content-Type": server.content_type, **server.version}
        if server.chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif server.lie is not None:
            headers["Content-Length"] = str(len(body) + server.lie)
        if start:
            headers["Content-Range"] = f"bytes {first}-{len(server.body) - 1}/{len(server.body)}"
        return self.answer(206 if start else server.status, headers, body)

    def answer(self, status, headers, body):
        server = self.server
        cut = server.cuts.pop(0) if server.cuts and body else None
        self.protocol_version = "HTTP/1.1" if server.chunked else "HTTP/1.0"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        body = body[:cut]
        server.sent += len(body)
        self.wfile.write(b"%x\r\n%s\r\n" % (len(body), body) if server.chunked else body)
        if server.chunked and cut is None:
            self.wfile.write(b"0\r\n\r\n")
        self.wfile.flush()
        self.close_connection = True
        if cut is not None and server.stall is not None:
            server.stall.wait(30)
        elif cut is not None and server.reset:
            time.sleep(0.1)  # let the client read what was sent: a reset discards the rest
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """No waiting, and no proxy between the tests and their server."""
    monkeypatch.setattr(download, "WAIT", 0)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data" / "set"


def sha256(body):
    return "sha256:" + hashlib.sha256(body).hexdigest()


def get(server, folder, name="images.npy", checksum=None):
    fetch([Download(f"{server.url}/{name}", checksum)], folder)


def partial(folder, name="images.npy"):
    return folder.with_name("set.part") / f"{name}.partial"


def refused(server, folder, error, match, **options):
    with pytest.raises(error, match=match):
        get(server, folder, **options)
    assert not folder.exists()


# Downloads


@pytest.mark.parametrize("checksum", [None, sha256(BODY), "md5:" + hashlib.md5(BODY).hexdigest()])
def test_a_file_is_put_into_its_folder(server, folder, checksum, capsys):
    get(server, folder, checksum=checksum)
    assert (folder / "images.npy").read_bytes() == BODY
    assert [path.name for path in folder.parent.rglob("*")] == ["set", "images.npy"]
    assert server.agents == {download.USER_AGENT}
    assert capsys.readouterr().err == f"downloading {server.url}/images.npy\n"


def test_several_files_come_into_one_folder(server, folder):
    fetch([Download(f"{server.url}/{name}?raw=1") for name in ("a.npy", "b.npy")], folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a.npy": BODY, "b.npy": BODY}


def test_files_of_one_name_are_refused(server, folder):
    with pytest.raises(ValueError, match=r"names of their own.* a.npy, a.npy"):
        fetch([Download(f"{server.url}/1/a.npy"), Download(f"{server.url}/2/a.npy")], folder)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(
    "version", [{"ETag": '"1"'}, {"ETag": 'W/"1"', "Last-Modified": "Mon, 01 Jan 2024 00:00:00 GMT"}]
)
def test_a_cut_connection_is_resumed(server, folder, reset, version):
    server.cuts, server.reset, server.version = [100_000, 50_000], reset, version
    get(server, folder, checksum=sha256(BODY))
    assert server.ranges_asked == [None, "bytes=100000-", "bytes=150000-"]
    assert server.sent == len(BODY)


def test_a_chunked_body_is_resumed(server, folder):
    server.chunked, server.cuts = True, [100_000]
    get(server, folder)
    assert server.ranges_asked == [None, "bytes=100000-"]
    assert (folder / "images.npy").read_bytes() == BODY


def test_retries_are_bounded_and_the_next_call_goes_on(server, folder):
    server.cuts = [10_000] * download.ATTEMPTS
    refused(server, folder, ConnectionError, f"{server.url}/images.npy: the connection was cut after 10,000 of 260,000")
    assert len(server.ranges_asked) == download.ATTEMPTS
    get(server, folder, checksum=sha256(BODY))
    assert server.ranges_asked[-1] == f"bytes={10_000 * download.ATTEMPTS}-"
    assert server.sent == len(BODY)


def test_without_progress_there_is_no_retry(server, folder):
    server.cuts = [0] * 9
    refused(server, folder, ConnectionError, "cut after 0 of 300,000")
    assert len(server.ranges_asked) == 1


@pytest.mark.parametrize("ranges", ["ignored", "unsatisfiable", "shifted"])
def test_a_server_that_cannot_continue_starts_anew(server, folder, ranges):
    server.cuts, server.ranges = [100_000], ranges
    get(server, folder)
    assert (folder / "images.npy").read_bytes() == BODY


def test_a_server_that_tells_no_version_starts_anew(server, folder):
    server.cuts, server.version = [100_000], {}
    get(server, folder)
    assert server.ranges_asked == [None, None]
    assert (folder / "images.npy").read_bytes() == BODY


def test_a_file_that_changed_is_started_anew(server, folder):
    server.cuts = [100_000] + [0] * 9
    refused(server, folder, ConnectionError, "cut")
    assert partial(folder).read_bytes() == BODY[:100_000]
    server.body, server.version, server.cuts = BODY[::-1], {"ETag": '"2"'}, []
    get(server, folder)
    assert server.ranges_asked[-1] == "bytes=100000-"
    assert (folder / "images.npy").read_bytes() == BODY[::-1]


def test_a_changed_file_is_noticed_where_the_server_continues_it_nevertheless(server, folder, monkeypatch):
    server.cuts = [100_000]
    answer = Handler.answer

    def careless(self, status, headers, body):
        changed = {"ETag": '"2"'} if len(server.ranges_asked) > 1 else {}
        answer(self, status, headers | changed, body)

    monkeypatch.setattr(Handler, "answer", careless)
    get(server, folder)
    assert server.ranges_asked == [None, "bytes=100000-", None]


@pytest.mark.parametrize(
    ("lie", "error", "match"),
    [(500, ConnectionError, "cut after"), (-500, ValueError, "sends more than the 299,500 bytes")],
)
def test_a_wrong_length_is_no_success(server, folder, lie, error, match):
    server.lie = lie
    refused(server, folder, error, match)
    assert not (lie < 0 and partial(folder).exists())
    server.lie = 0
    get(server, folder, checksum=sha256(BODY))


def test_without_a_length_a_checksum_is_needed(server, folder):
    server.lie = None
    refused(server, folder, ConnectionError, "does not say how long")
    get(server, folder, checksum=sha256(BODY))
    assert (folder / "images.npy").read_bytes() == BODY


def test_a_connection_that_stays_open_does_no_harm(server, folder, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.cuts, server.stall = [len(BODY)], threading.Event()
    get(server, folder)
    server.stall.set()
    assert len(server.paths) == 1


def test_a_connection_that_falls_silent_is_cut(server, folder, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.2)
    server.cuts, server.stall = [100_000], threading.Event()
    start = time.monotonic()
    get(server, folder)
    server.stall.set()
    assert time.monotonic() - start < 10
    assert server.ranges_asked == [None, "bytes=100000-"]


def test_a_wrong_file_is_deleted(server, folder):
    expected, found = sha256(b"another"), sha256(BODY)
    refused(server, folder, ValueError, f"{expected[7:]}, found {found[7:]}", checksum=expected)
    assert BODY not in [path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()]
    get(server, folder, checksum=found)


@pytest.mark.parametrize("content_type", ["text/html; charset=utf-8", "application/zip"])
def test_a_web_page_is_no_file(server, folder, content_type):
    server.cuts = [100_000] + [0] * 9
    refused(server, folder, ConnectionError, "cut", name="set.zip")
    server.body, server.version, server.content_type = b"\n<!DOCTYPE html><html></html>", {"ETag": '"2"'}, content_type
    server.cuts = []
    refused(server, folder, ValueError, "web page instead of set.zip", name="set.zip")
    if "html" in content_type:  # which is known before anything is lost
        assert partial(folder, "set.zip").read_bytes() == BODY[:100_000]


@pytest.mark.parametrize("status", [404, 500, 204])
def test_other_answers_are_named(server, folder, status):
    server.status = status
    refused(server, folder, ConnectionError, rf"{server.url}/images.npy: the server answers {status} \w+")


def test_a_server_that_is_not_there_is_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(
        ConnectionError, match=f"http://127.0.0.1:{port}/a.npy: the server cannot be reached: .*refused"
    ):
        fetch([Download(f"http://127.0.0.1:{port}/a.npy")], folder)


def test_redirects_are_followed_and_ranges_with_them(server, folder):
    server.location, server.cuts = "/moved.npy", [100_000]
    get(server, folder)
    assert server.paths == ["/images.npy", "/moved.npy"] * 2
    assert server.sent == len(BODY)
    assert (folder / "images.npy").read_bytes() == BODY


@pytest.mark.parametrize(
    ("location", "match"),
    [("file:///etc/hostname", "Redirection to .* is not allowed"), ("ftp://127.0.0.1/a.npy", "unknown url type: ftp")],
)
def test_redirects_leave_the_web_for_nothing_else(server, folder, location, match):
    server.location = location
    refused(server, folder, ConnectionError, f"{server.url}/images.npy: .*{match}")


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a.npy", "http://127.0.0.1/", "a.npy"])
def test_other_urls_are_refused(url):
    with pytest.raises(ValueError, match=f"http or https url of a file, not {url}"):
        Download(url)


@pytest.mark.parametrize("checksum", ["sha1:" + "0" * 40, "md5:" + "0" * 31, "0" * 32])
def test_other_checksums_are_refused(checksum):
    with pytest.raises(ValueError, match=f"not {checksum}"):
        Download("http://127.0.0.1/a.npy", checksum)


def test_the_proxy_of_the_environment_is_used(server, folder, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    fetch([Download("http://nowhere.invalid/a.npy")], folder)
    assert server.paths == ["http://nowhere.invalid/a.npy"]


def test_a_full_disk_is_noticed_before_the_download(server, folder, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=200_000))
    refused(server, folder, OSError, "images.npy needs 300,000 bytes, and .* has room for 200,000")


def test_a_terminal_shows_a_bar(server, folder, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    get(server, folder)
    assert "300.0/300.0 kB" in re.sub(r"\x1b\[[\d;?]*\w", "", terminal.getvalue())


# Folders


def test_a_folder_that_exists_is_left_alone(server, folder):
    folder.mkdir(parents=True)
    with pytest.raises(FileExistsError, match="set exists already"):
        get(server, folder)
    with pytest.raises(FileExistsError, match="set exists already"):
        install(lambda path: None, folder)
    assert list(folder.parent.rglob("*")) == [folder]
    assert server.paths == []


def test_a_folder_that_another_process_has_just_finished_is_left_alone(server, folder, monkeypatch):
    monkeypatch.setattr(download.fcntl, "flock", lambda lock, how: folder.mkdir())
    with pytest.raises(FileExistsError, match="set exists already"):
        get(server, folder)
    assert server.paths == []


def test_install_puts_into_place_what_a_function_gets(folder):
    def get_it(root):
        assert not folder.exists()
        (root / "raw").mkdir()
        (root / "raw" / "a").write_text("a")

    install(get_it, folder)
    assert (folder / "raw" / "a").read_text() == "a"
    assert list(folder.parent.iterdir()) == [folder]


def test_install_keeps_nothing_of_what_fails(folder):
    def fail(root):
        (root / "half").mkdir()
        raise RuntimeError("no such server")

    with pytest.raises(ConnectionError, match="set cannot be downloaded: no such server"):
        install(fail, folder)
    assert not folder.exists()
    install(lambda root: (root / "other").mkdir(), folder)
    assert [path.name for path in folder.iterdir()] == ["other"]


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_second_process_is_refused_and_a_killed_one_is_continued(server, folder, how):
    server.cuts, server.stall = [200_000], threading.Event()
    command = (
        "import sys; from pathlib import Path; from datamodules.download import *;"
        "fetch([Download(sys.argv[1])], Path(sys.argv[2]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, f"{server.url}/images.npy", folder], cwd=ROOT, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 30
        while not (partial(folder).exists() and partial(folder).stat().st_size > 100_000):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match=r"another process is filling .*set\.part"):
            get(server, folder)
    finally:
        process.send_signal(how)
        process.wait()
        server.stall.set()
    assert not folder.exists()
    begun = partial(folder).stat().st_size
    get(server, folder, checksum=sha256(BODY))
    assert server.ranges_asked == [None, f"bytes={begun}-"]


def test_what_a_killed_process_had_unpacked_does_not_stay(server, folder):
    left = folder.with_name("set.part") / ".content" / "half"
    left.mkdir(parents=True)
    get(server, folder)
    assert [path.name for path in folder.iterdir()] == ["images.npy"]


# Archives


def entry(name, body=b"", kind=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(body), kind, link
    return info, body


def tar(*entries, mode="w", **options):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, **options) as file:
        for info, body in entries:
            file.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


def zipped(*entries):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, body in entries:
            file.writestr(name, body)
    return buffer.getvalue()


def fetch_archive(server, folder, name, body):
    server.body = body
    get(server, folder, name=name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse_archive(server, folder, name, body, match):
    server.body = body
    before = {path for path in folder.parent.parent.rglob("*") if "set.part" not in path.parts}
    refused(server, folder, ValueError, rf"(?s){name} is damaged or unsafe, and was deleted: .*{match}", name=name)
    left = set(folder.parent.parent.rglob("*")) - before - {folder.parent, folder.with_name("set.part")}
    assert {path.name for path in left} <= {".lock", f"{name}.validator"}


FILES = (entry("set", kind=tarfile.DIRTYPE), entry("set/a.png", b"a"), entry("./deep/down/b.png", BODY))


@pytest.mark.parametrize("name", ["s.tar", "s.tar.gz", "s.tgz", "S.TGZ"])
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_archives_are_unpacked(server, folder, name, form):
    body = tar(*FILES, mode="w" if name == "s.tar" else "w:gz", format=form)
    assert fetch_archive(server, folder, name, body) == {"set/a.png": b"a", "deep/down/b.png": BODY}
    assert list(folder.parent.iterdir()) == [folder]


def test_zip_archives_are_unpacked(server, folder):
    body = zipped(("set/", b""), ("set/a.png", b"a"), ("deep\\b.png", BODY))
    assert fetch_archive(server, folder, "s.zip", body) == {"set/a.png": b"a", "deep/b.png": BODY}


def test_archives_become_one_folder_and_are_unpacked_anew_after_a_cut(server, folder):
    server.body = zipped(("a", BODY))
    server.cuts = [len(server.body), 1000] + [0] * 9
    downloads = [Download(f"{server.url}/{name}") for name in ("1.zip", "2.npy")]
    with pytest.raises(ConnectionError, match=r"2\.npy"):
        fetch(downloads, folder)
    asked = len(server.ranges_asked)
    server.cuts = []
    fetch(downloads, folder)
    assert server.paths[asked:] == ["/2.npy"]
    assert {path.name for path in folder.iterdir()} == {"a", "2.npy"}


def test_links_inside_of_an_archive_become_files(server, folder):
    links = [
        entry("set/soft", kind=tarfile.SYMTYPE, link="../first/../set/a.png"),
        entry("hard", kind=tarfile.LNKTYPE, link="set/a.png"),
    ]
    assert fetch_archive(server, folder, "s.tar", tar(links[0], *FILES[:2], links[1])) == dict.fromkeys(
        ("set/a.png", "set/soft", "hard"), b"a"
    )
    assert not any(path.is_symlink() for path in folder.rglob("*"))


OUTSIDE = "would lie outside"
NO_FILE = "which is no file of it"


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ([entry("../evil", b"x")], OUTSIDE),
        ([entry("set/../../evil", b"x")], OUTSIDE),
        ([entry("/evil", b"x")], OUTSIDE),
        ([entry("..\\evil", b"x")], OUTSIDE),
        ([entry("C:\\evil", b"x")], OUTSIDE),
        ([entry("../evil", kind=tarfile.DIRTYPE)], OUTSIDE),
        ([entry("evil", kind=tarfile.SYMTYPE, link="/etc/hostname")], OUTSIDE),
        ([entry("evil", kind=tarfile.SYMTYPE, link="../victim")], OUTSIDE),
        ([entry("evil", kind=tarfile.LNKTYPE, link="../victim")], OUTSIDE),
        ([entry("evil", kind=tarfile.LNKTYPE, link="/etc/hostname")], OUTSIDE),
        ([entry("../evil", kind=tarfile.LNKTYPE, link="set/a.png")], OUTSIDE),
        ([entry("evil", kind=tarfile.SYMTYPE, link="absent")], NO_FILE),
        ([entry("evil", kind=tarfile.SYMTYPE, link="set")], NO_FILE),
        ([entry("evil", kind=tarfile.SYMTYPE, link="evil")], NO_FILE),
        ([entry("d", kind=tarfile.SYMTYPE, link="."), entry("e", kind=tarfile.SYMTYPE, link="d/d/../..")], NO_FILE),
        ([entry("d", kind=tarfile.SYMTYPE, link="set"), entry("d/evil", b"x")], "d"),
        ([entry("set/a.png", kind=tarfile.SYMTYPE, link="../other"), entry("other", b"x")], "exists"),
        ([entry("set/a.png", b"again")], "exists"),
        ([entry("set/a.png/b", b"x")], "exists"),
        ([entry("x" * 300, b"x")], "File name too long"),
        ([entry("pipe", kind=tarfile.FIFOTYPE)], "neither a file"),
        ([entry("device", kind=tarfile.CHRTYPE)], "neither a file"),
    ],
)
def test_unsafe_tar_members_are_refused(server, folder, entries, match):
    (folder.parent.parent / "victim").write_text("precious")
    refuse_archive(server, folder, "s.tar", tar(*FILES, *entries), match)
    assert (folder.parent.parent / "victim").read_text() == "precious"


def linked_zip():
    info = zipfile.ZipInfo("evil")
    info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return zipped((info, b"/etc/hostname"))


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (zipped(("../evil", b"x")), OUTSIDE),
        (zipped(("..\\evil", b"x")), OUTSIDE),
        (zipped(("/evil", b"x")), OUTSIDE),
        (zipped(("C:/evil", b"x")), OUTSIDE),
        (zipped(("../evil/", b"")), OUTSIDE),
        (linked_zip(), "'evil' is neither a file"),
    ],
)
def test_unsafe_zip_members_are_refused(server, folder, body, match):
    refuse_archive(server, folder, "s.zip", body, match)


def pax_bomb():
    """A header that is larger than all else, and would be read into memory."""
    info = tarfile.TarInfo("a")
    info.pax_headers = {"comment": "0" * 200_000}
    return tar((info, b""), mode="w:gz", format=tarfile.PAX_FORMAT)


def sparse_bomb():
    """A file that is said to be huge and has no bytes."""
    info = tarfile.TarInfo("a")
    info.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.name": "a"}
    info.pax_headers |= {"GNU.sparse.size": str(10**12), "GNU.sparse.map": f"{10**12},0"}
    return tar((info, b""), format=tarfile.PAX_FORMAT)


@pytest.mark.parametrize(
    ("name", "body", "match"),
    [
        ("s.zip", zipped(("a", bytes(200_000))), "more than"),
        ("s.zip", zipped(*((str(i), bytes(9_000)) for i in range(9))), "more than"),
        ("s.tar.gz", tar(entry("a", bytes(200_000)), mode="w:gz"), "more than"),
        ("s.tar.gz", gzip.compress(tar(entry("a", b"a")) + bytes(200_000)), "more than"),
        ("s.tar.gz", pax_bomb(), "more than"),
        ("s.tar", sparse_bomb(), "neither a file"),
        ("s.tar", tar(*(entry(str(i)) for i in range(50))), "more than 40 members"),
        ("s.zip", zipped(*((str(i), b"") for i in range(50))), "more than 40 members"),
    ],
)
def test_bombs_are_refused(server, folder, monkeypatch, name, body, match):
    monkeypatch.setattr(archives, "MAX_RATIO", 2)
    monkeypatch.setattr(archives, "SLACK", 12_000)
    monkeypatch.setattr(archives, "MAX_MEMBERS", 40)
    refuse_archive(server, folder, name, body, match)


def test_what_unpacks_to_more_than_the_disk_is_refused_and_kept(server, folder, monkeypatch):
    server.body = zipped(("a", bytes(200_000)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100_000))
    refused(server, folder, OSError, "a needs 200,000 bytes", name="s.zip")
    monkeypatch.undo()
    get(server, folder, name="s.zip")
    assert len(server.paths) == 1


def encrypted():
    body = bytearray(zipped(("a.png", BODY)))
    body[6] |= 1  # the flag, in the header of the member
    body[body.rindex(b"PK\1\2") + 8] |= 1  # and in the directory
    return bytes(body)


def flipped(body, place):
    return body[:place] + bytes([body[place] ^ 0xFF]) + body[place + 1 :]


ZIP = zipped(("a", BODY))
TWO = tar(entry("a", BODY), entry("b", BODY))
TWO_GZ = gzip.compress(TWO)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("s.zip", encrypted()),
        ("s.zip", BODY),
        ("s.zip", ZIP[:-30]),
        ("s.zip", flipped(ZIP, 1000)),
        ("s.zip", flipped(ZIP, len(ZIP) - 3)),  # where the directory is said to be
        ("s.tar", BODY),
        ("s.tar", TWO[:400_000]),
        ("s.tar", TWO[: TWO.index(b"b\0\0\0")]),
        ("s.tar", TWO[: TWO.index(b"b\0\0\0") + 100]),
        ("s.tar", flipped(TWO, TWO.index(b"b\0\0\0"))),
        ("s.tar.gz", TWO),
        ("s.tar.gz", TWO_GZ[:400_000]),
        ("s.tar.gz", TWO_GZ[:-4]),
        ("s.tar.gz", flipped(TWO_GZ, 300_000)),
        ("s.tar.gz", flipped(TWO_GZ, len(TWO_GZ) - 6)),
    ],
)
def test_damaged_archives_are_refused_and_fetched_anew(server, folder, name, body):
    refuse_archive(server, folder, name, body, "")
    server.body = (
        zipped(("a", b"a")) if name == "s.zip" else tar(entry("a", b"a"), mode="w:gz" if "gz" in name else "w")
    )
    get(server, folder, name=name)
    assert (folder / "a").read_bytes() == b"a"
