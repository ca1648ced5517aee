"""Released files: downloaded once, whole or not at all, and held to their digest ever after."""

import contextlib
import http.server
import pathlib
import threading

import pytest
import torch

import download
from checkpoint import load_checkpoint

NAME = "DiT-XL-2-256x256.pt"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server in place of the release's; `server.cut` shortens a body, `server.page` replaces it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests.append(self.path)
            if self.path != f"/models/{NAME}":
                return self.send_error(404)
            body = self.server.page or self.server.body
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # a client that gives up is what some tests are about
                self.wfile.write(body[: len(body) - self.server.cut])

        def log_message(self, *args):
            pass

    torch.save({"weight": torch.arange(10000.0)}, tmp_path / "weights.pt")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.body, httpd.cut, httpd.page, httpd.requests = (tmp_path / "weights.pt").read_bytes(), 0, None, []
        httpd.home = tmp_path / "home"
        monkeypatch.setenv("ADACORR_HOME", str(httpd.home))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        for name in download.RELEASED:
            monkeypatch.setitem(download.RELEASED, name, f"http://127.0.0.1:{httpd.server_port}/models/{name}")
        thread = threading.Thread(target=httpd.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield httpd
        httpd.shutdown()
        thread.join()


def test_download_once_then_check_at_every_load(server):
    server.home.mkdir()
    (server.home / f"{NAME}.sha256").write_text("of an older file")
    checkpoint = load_checkpoint(NAME)
    target = server.home / NAME
    assert checkpoint.path == target
    assert target.read_bytes() == server.body
    assert (server.home / f"{NAME}.sha256").read_text(encoding="utf-8") == f"{checkpoint.sha256}  {NAME}\n"
    assert sorted(p.name for p in server.home.iterdir()) == [NAME, f"{NAME}.sha256"]
    assert torch.equal(checkpoint.state_dict["weight"], torch.arange(10000.0))

    (server.home / f"{NAME}.sha256").unlink()  # as for a file that was put there by hand: recorded at first use
    assert load_checkpoint(NAME, offline=True).sha256 == checkpoint.sha256
    assert server.requests == [f"/models/{NAME}"]

    content = bytearray(target.read_bytes())
    content[len(content) // 2] ^= 1  # one flipped bit, which the file format itself would not notice
    target.write_bytes(content)
    with pytest.raises(ValueError, match=f"not the file that was recorded.*{checkpoint.sha256}"):
        load_checkpoint(NAME, offline=True)


def test_truncated_transfer_leaves_nothing(server):
    server.cut = 1000
    total = len(server.body)
    with pytest.raises(ValueError, match=rf"stopped at {total - 1000} of {total} bytes.*same command again"):
        load_checkpoint(NAME)
    assert list(server.home.iterdir()) == []
    server.cut = 0
    assert load_checkpoint(NAME).path.is_file()


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt("now"), KeyboardInterrupt, "now"),
        (OSError(28, "No space left on device"), ValueError, "could not download .*No space left"),
    ],
)
def test_interrupt_and_full_disk_leave_nothing(server, monkeypatch, error, raised, message):
    def fail(source, target, _):
        target.write(source.read(1000))
        raise error

    monkeypatch.setattr(download.shutil, "copyfileobj", fail)
    with pytest.raises(raised, match=message):
        load_checkpoint(NAME)
    assert list(server.home.iterdir()) == []


def test_web_page_and_dead_link_are_reported(server):
    server.page = b"<html>please log in</html>"
    with pytest.raises(ValueError, match=r"what http.* served is a web page"):
        load_checkpoint(NAME)
    with pytest.raises(ValueError, match=r"could not download http.*512x512.pt: HTTP Error 404"):
        load_checkpoint("DiT-XL-2-512x512.pt")
    assert list(server.home.iterdir()) == []


def test_offline_lists_the_url_and_every_path(server):
    with pytest.raises(ValueError, match="--offline") as caught:
        load_checkpoint(NAME, offline=True)
    for tried in (download.RELEASED[NAME], server.home / NAME, pathlib.Path.cwd() / NAME):
        assert str(tried) in str(caught.value)
    assert server.requests == []


def test_local_file_comes_first(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_bytes(server.body)
    assert load_checkpoint(NAME).path == pathlib.Path(NAME)
    assert not (tmp_path / f"{NAME}.sha256").exists()  # a digest is written beside downloads only
    assert server.requests == []
