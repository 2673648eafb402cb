"""The verb ``data``, on all data in miniature and against a local server."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import StringIO
from pathlib import Path

import pytest
from miniature import write_everything
from torchvision import datasets

from datamodules import download
from datamodules.catalogue import ENTRIES, SOURCES
from datamodules.download import Download
from experiments.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
BY_HAND = [source for source, facts in SOURCES.items() if isinstance(facts.get, str)]
GET_FROM = """
import signal, sys
from dataclasses import replace
from datamodules.catalogue import SOURCES
from datamodules.download import Download
from experiments.__main__ import main

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, wherever the tests run
SOURCES["isun"] = replace(SOURCES["isun"], get=(Download(sys.argv[1]),))
sys.exit(main(["data", "get", "isun", "--root", sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Root of all data, which no test changes; the catalogue expects as few images as there are."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        write_everything(folder, patch, ENTRIES)
        yield folder


@pytest.fixture
def some(everything, tmp_path):
    """Root of data with copies of these sources alone."""

    def copy(*sources):
        root = tmp_path / "data"
        for source in sources:
            shutil.copytree(everything / source, root / source)
        return root

    return copy


@pytest.fixture
def run(capsys):
    """Run the verb; return the exit status, standard output and standard error."""

    def run(*args):
        capsys.readouterr()
        status = main(["data", *map(str, args)])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def rows(out):
    """Return (images, fingerprint, state) of each set that a table lists."""
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]
    return {name: tuple(rest) for name, *rest in cells}


def note(out, err, subject):
    """Return what is said about a set below the table."""
    (line,) = {line for line in (out + err).splitlines() if line.startswith(f"{subject}: ")}
    return line


# Checking


def test_every_set_is_listed(everything, run):
    status, out, err = run("check", "--root", everything)
    table = rows(out)
    assert (status, err) == (0, "")
    assert str(everything) in out.replace("\n", "")
    assert list(table) == list(ENTRIES)
    for name, (images, fingerprint, state) in table.items():
        assert images == f"{ENTRIES[name].count:,}"
        assert re.fullmatch("[0-9a-f]{12}", fingerprint)
        assert state == "present"
    _, out, _ = run("check", "--root", everything, "svhn", "noise", "omniglot")
    assert rows(out) == {name: table[name] for name in ("svhn", "noise", "omniglot")}


def test_missing_sets_say_how_to_get_them(tmp_path, run):
    status, out, err = run("check", "--root", tmp_path / "nowhere")
    table = rows(out)
    assert (status, err) == (0, "")
    assert table.pop("noise")[2] == "present"
    assert list(table) == [name for name in ENTRIES if name != "noise"]
    for name, (images, fingerprint, state) in table.items():
        entry = ENTRIES[name]
        by_hand = entry.source in BY_HAND
        assert images == (f"{entry.count:,}" if entry.count else "")
        assert fingerprint == ""
        assert state == ("missing: see below" if by_hand else f"missing: make data-{entry.source}")
    for source in BY_HAND:
        assert note(out, err, source) == f"{source}: {SOURCES[source].get}"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("isun", "iSUN/iSUN_patches/1.png"),
        ("textures_test", "dtd/dtd/images/banded/banded_0001.jpg"),
        ("tiny_imagenet_val", "tiny-imagenet-200/val/images/val_2.JPEG"),
        ("tiny_imagenet_train", "tiny-imagenet-200/train/n02/images/n02_0.JPEG"),
        ("cifar10", "cifar-10-batches-py/test_batch"),
        ("mnist", "MNIST/raw/t10k-images-idx3-ubyte"),
        ("svhn", "test_32x32.mat"),
        ("lsun", "tower_val_lmdb/data.mdb"),
        ("random_images", "300K_random_images.npy"),
        ("omniglot", "omniglot-py/images_evaluation/Angelic/character01/0965_02.png"),
    ],
)
def test_an_incomplete_folder_is_damaged(some, run, name, lost):
    source = ENTRIES[name].source
    root = some(*{source, "inaturalist"})
    (root / source / lost).unlink()
    status, out, err = run("check", "--root", root, name, "inaturalist")
    table = rows(out)
    assert status == 2
    assert table[name] == (f"{ENTRIES[name].count:,}", "", "damaged: see below")
    assert table["inaturalist"][2] == "present"
    assert name in err
    assert "inaturalist" not in err
    way_out = f"remove {root / source}, then `make data-{source}` downloads it anew"
    assert note(out, err, name).endswith(way_out)


def test_an_empty_folder_is_damaged(tmp_path, run):
    for source in SOURCES:
        (tmp_path / source).mkdir()
    status, out, err = run("check", "--root", tmp_path)
    assert status == 2
    assert {name for name, row in rows(out).items() if row[2] != "damaged: see below"} == {"noise"}
    for name, entry in ENTRIES.items():
        if name == "noise":
            continue
        way_out = f"complete {tmp_path / entry.source}" if entry.source in BY_HAND else f"make data-{entry.source}"
        assert way_out in note(out, err, name)
        assert name in err


def test_an_incomplete_folder_of_your_own_making_is_to_be_completed(some, run):
    root = some("imagenet")
    (root / "imagenet/val/n02/1.JPEG").unlink()
    status, out, err = run("check", "--root", root, "imagenet", "imagenet_train")
    assert status == 2
    assert [row[2] for row in rows(out).values()] == ["damaged: see below", "present"]
    assert note(out, err, "imagenet").endswith(f"complete {root / 'imagenet'}")


def test_a_folder_with_too_many_images_is_damaged(some, run):
    root = some("isun")
    shutil.copy(root / "isun/iSUN/iSUN_patches/0.png", root / "isun/iSUN/iSUN_patches/3.png")
    status, out, err = run("check", "--root", root, "isun")
    assert (status, rows(out)["isun"][2]) == (2, "damaged: see below")
    assert "isun has 3 images" in note(out, err, "isun")
    assert "holds 4" in note(out, err, "isun")


def test_unknown_names_list_the_known(everything, run):
    status, out, err = run("check", "--root", everything, "svhn", "svnh")
    assert (status, out) == (2, "")
    assert "svnh" in err
    assert all(name in err for name in ENTRIES)


@pytest.mark.parametrize("make", [Path.touch, lambda path: path.symlink_to("nowhere")], ids=["file", "dangling link"])
def test_what_is_no_folder_has_a_row_as_all_others(tmp_path, run, make):
    for source in SOURCES:
        make(tmp_path / source)
    status, out, err = run("check", "--root", tmp_path)
    table = rows(out)
    assert status == 2
    assert list(table) == list(ENTRIES)
    assert {name for name, row in table.items() if row[2] != "damaged: see below"} == {"noise"}
    for name, entry in ENTRIES.items():
        assert name == "noise" or str(tmp_path / entry.source) in note(out, err, name)


@pytest.mark.parametrize(
    "source", ["isun", "cifar10", "mnist", "svhn", "textures", "lsun", "random_images", "imagenet64"]
)
def test_a_folder_that_may_not_be_read_has_a_row_as_all_others(some, run, source):
    root = some(*{source, "inaturalist"})
    (root / source).chmod(0)
    if os.access(root / source, os.R_OK):
        pytest.skip("this user may read everything")
    try:
        status, out, err = run("check", "--root", root, source, "inaturalist")
    finally:
        (root / source).chmod(0o700)
    table = rows(out)
    assert status == 2
    assert table["inaturalist"][2] == "present"
    assert table[source][2] == "damaged: see below"
    assert str(root / source) in note(out, err, source)


def test_a_disk_that_fails_spoils_one_row_alone(some, run, monkeypatch):
    root = some("isun", "inaturalist")

    def fail(folder, fit):
        raise OSError(5, "Input/output error", str(folder))

    monkeypatch.setitem(ENTRIES, "isun", replace(ENTRIES["isun"], read=fail))
    status, out, err = run("check", "--root", root, "isun", "inaturalist")
    assert status == 2
    assert [row[2] for row in rows(out).values()] == ["damaged: see below", "present"]
    assert "Input/output error" in note(out, err, "isun")


def test_the_root_may_be_said_anywhere(some, tmp_path, run, monkeypatch):
    root = some("svhn")
    monkeypatch.setenv("OOD_DATA", str(tmp_path / "elsewhere"))
    assert rows(run("check", "svhn")[1])["svhn"][2] == "missing: make data-svhn"
    said = ["--root", root]
    for args in ([*said, "check", "svhn"], ["check", *said, "svhn"], ["check", "svhn", *said]):
        status, out, _ = run(*args)
        assert (status, rows(out)["svhn"][2]) == (0, "present")
    for args in ([*said, "get", "svhn"], ["get", *said, "svhn"], ["get", "svhn", *said]):
        status, _, err = run(*args)
        assert (status, str(root / "svhn") in err) == (2, True)
    monkeypatch.setenv("OOD_DATA", str(root))
    assert rows(run("check", "svhn")[1])["svhn"][2] == "present"


# Getting


class Server(ThreadingHTTPServer):
    """Serves ``files`` by path.

    Attributes:
        requests: what was asked for, each a path and a range.
        stop: after how many bytes of a body to send no more; ``None``: all of it.
        released: connections that stopped end when it is set.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.requests, self.stop, self.released = {}, [], None, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *args):
        pass

    def do_GET(self):
        wanted = self.headers["Range"]
        self.server.requests.append((self.path, wanted))
        body = self.server.files.get(self.path)
        if body is None:
            self.send_error(404)
            return
        first = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - first))
        self.send_header("ETag", '"1"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[first : self.server.stop])
        if self.server.stop is not None:
            self.server.released.wait(30)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def nobody():
    """URL of a server that is not there."""
    server = Server()
    server.server_close()
    return server.url


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    """No waiting, and no proxy between the tests and their server."""
    monkeypatch.setattr(download, "WAIT", 0)
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def from_server(everything, server, tmp_path, monkeypatch):
    """Let a source be got from the server, as one archive; return the archive."""

    def publish(source, url=server.url):
        archive = Path(shutil.make_archive(str(tmp_path / f"archive of {source}"), "gztar", everything / source))
        server.files[f"/{source}.tar.gz"] = archive.read_bytes()
        files = (Download(f"{url}/{source}.tar.gz"),)
        monkeypatch.setitem(SOURCES, source, replace(SOURCES[source], get=files))
        return archive.read_bytes()

    return publish


@pytest.fixture
def omniglot(everything, server, tmp_path, monkeypatch):
    """Let torchvision get Omniglot from the server."""

    def publish(url=server.url):
        archive = Path(shutil.make_archive(str(tmp_path / "zip"), "zip", everything / "omniglot/omniglot-py"))
        server.files["/images_evaluation.zip"] = archive.read_bytes()
        monkeypatch.setattr(datasets.Omniglot, "download_url_prefix", url)
        monkeypatch.setitem(datasets.Omniglot.zips_md5, "images_evaluation", md5(archive.read_bytes()).hexdigest())

    return publish


@pytest.fixture
def root(tmp_path):
    """Root of data without any."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def state(run, root, name):
    return rows(run("check", "--root", root, name)[1])[name][2]


@pytest.mark.parametrize("name", [*BY_HAND, "imagenet_train", "openood_cifar10_test_tin"])
def test_what_no_program_can_get_is_explained(root, run, name):
    source = ENTRIES[name].source if name in ENTRIES else name
    status, out, err = run("get", "--root", root, name)
    assert (status, out) == (2, "")
    assert str(root / source) in err
    assert SOURCES[source].get in err
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("name", ["noise", "generated"])
def test_what_is_made_needs_no_download(root, run, name):
    status, out, err = run("get", "--root", root, name)
    assert (status, err) == (0, "")
    assert "nothing to get" in out
    assert list(root.iterdir()) == []


def test_unknown_sources_list_the_known(root, run):
    status, _, err = run("get", "--root", root, "svnh")
    assert status == 2
    assert "svnh" in err
    assert all(source in err for source in SOURCES)


def test_a_set_that_is_there_is_left_alone(some, run, server, from_server, omniglot):
    from_server("isun")
    omniglot()
    root = some("isun", "omniglot")
    (root / "isun/mine.txt").write_text("mine")
    for name in ("isun", "omniglot"):
        before = sorted(root.rglob("*"))
        status, _, err = run("get", "--root", root, name)
        assert status == 2
        assert f"{root / name} exists already" in err
        assert sorted(root.rglob("*")) == before
    assert server.requests == []


def test_a_download_is_unpacked_and_then_present(root, run, from_server, server):
    from_server("isun")
    assert state(run, root, "isun") == "missing: make data-isun"
    status, out, err = run("get", "--root", root, "isun")
    assert status == 0
    assert SOURCES["isun"].licence in out
    assert str(root / "isun") in out
    assert f"{server.url}/isun.tar.gz" in err
    assert list(root.iterdir()) == [root / "isun"]
    assert state(run, root, "isun") == "present"


def test_a_set_brings_its_whole_source(root, run, from_server):
    from_server("textures")
    assert run("get", "--root", root, "textures_test")[0] == 0
    assert [state(run, root, name) for name in ("textures_test", "textures")] == ["present", "present"]


def test_a_terminal_sees_the_progress_to_the_end(root, from_server, monkeypatch):
    archive = from_server("isun")
    terminal = StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["data", "get", "--root", str(root), "isun"]) == 0
    shown = re.findall(r"([\d.]+)/([\d.]+) kB", re.sub(r"\x1b\[[\d;?]*\w", "", terminal.getvalue()))
    assert shown[-1] == (f"{len(archive) / 1000:.1f}",) * 2


def test_torchvision_gets_its_own_sets(root, run, omniglot, server):
    omniglot()
    status, out, err = run("get", "--root", root, "omniglot")
    assert status == 0
    assert "MIT" in out
    assert "100%" in err
    assert {path for path, _ in server.requests} == {"/images_evaluation.zip"}
    assert list(root.iterdir()) == [root / "omniglot"]
    assert state(run, root, "omniglot") == "present"


def test_of_several_all_are_got_that_can_be(root, run, from_server, omniglot, nobody):
    from_server("isun")
    from_server("lsun_crop", nobody)
    from_server("textures")
    omniglot(nobody)
    names = ["lsun_crop", "isun", "imagenet", "omniglot", "noise", "textures"]
    status, out, err = run("get", "--root", root, *names)
    message = err[err.index("error: ") :]
    assert status == 2
    assert {path.name for path in root.iterdir()} == {"isun", "textures"}
    assert [state(run, root, name) for name in ("isun", "textures")] == ["present", "present"]
    assert [name for name in names if name in message] == ["lsun_crop", "imagenet", "omniglot"]
    assert "nothing to get" in out


def test_a_server_that_is_not_there_is_named(root, run, from_server, omniglot, nobody):
    from_server("lsun_crop", nobody)
    omniglot(nobody)
    for name in ("lsun_crop", "omniglot"):
        status, _, err = run("get", "--root", root, name)
        message = err[err.index("error: ") :]
        assert status == 2
        assert name in message
        assert "refused" in message
        assert list(root.iterdir()) == []


def test_a_file_that_is_not_there_is_named(root, run, from_server, omniglot, server):
    from_server("lsun_crop")
    omniglot()
    server.files.clear()
    for name in ("lsun_crop", "omniglot"):
        status, _, err = run("get", "--root", root, name)
        message = err[err.index("error: ") :]
        assert status == 2
        assert name in message
        assert "404" in message
        assert server.url.removeprefix("http://") in message
        assert list(root.iterdir()) == []


def test_torchvision_leaves_nothing_of_a_connection_that_was_cut(root, run, omniglot, server):
    omniglot()
    server.stop = 1000
    server.released.set()
    status, _, err = run("get", "--root", root, "omniglot")
    assert status == 2
    assert "omniglot" in err[err.index("error: ") :]
    assert list(root.iterdir()) == []
    server.stop = None
    assert run("get", "--root", root, "omniglot")[0] == 0
    assert state(run, root, "omniglot") == "present"


def test_an_interrupted_download_goes_on_with_the_next_call(root, run, from_server, server):
    archive = from_server("isun")
    server.stop = len(archive) // 2
    process = subprocess.Popen(
        [sys.executable, "-c", GET_FROM, f"{server.url}/isun.tar.gz", root],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    partial = root / "isun.part/isun.tar.gz.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size == server.stop):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in output
    assert "interrupted" in output
    assert state(run, root, "isun") == "missing: make data-isun"
    begun, server.stop = server.stop, None
    assert run("get", "--root", root, "isun")[0] == 0
    assert [asked for _, asked in server.requests] == [None, f"bytes={begun}-"]
    assert list(root.iterdir()) == [root / "isun"]
    assert state(run, root, "isun") == "present"


def test_nothing_is_left_where_torchvision_was_interrupted(root, run, omniglot, monkeypatch):
    omniglot()

    def interrupted(self):
        Path(self.root).mkdir()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Omniglot, "download", interrupted)
        assert run("get", "--root", root, "omniglot")[0] == 130
    assert list(root.iterdir()) == []
    assert run("get", "--root", root, "omniglot")[0] == 0
    assert state(run, root, "omniglot") == "present"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("args", "command"),
    [
        (["data-check"], "data check"),
        (["data-check", "ARGS=svhn isun"], "data check svhn isun"),
        (["data-svhn"], "data get svhn"),
        (["data-tiny_imagenet", "ARGS=--root elsewhere"], "data get tiny_imagenet --root elsewhere"),
    ],
)
def test_make_calls_the_verb(args, command):
    environment = {"PATH": os.environ["PATH"]}  # without what a make that runs the tests hands down
    printed = subprocess.run(
        ["make", "-n", *args], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    calls = [line.strip() for line in printed.stdout.splitlines() if "-m experiments" in line]
    assert calls == [f".venv/bin/python -m experiments {command}"]
