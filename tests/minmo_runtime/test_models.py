"""Fetching, importing and verifying the parents' files; the hub is a small local server with the hub's own paths."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from minmo_runtime import models
from minmo_runtime.models import ModelsError, fetch, import_folder, state_of, verify, wanted_sources
from minmo_runtime.profiles import Source

FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 5000,
    "model-00002-of-00002.safetensors": b"b" * 5000,
    "README.md": b"not wanted",
}
SOURCE = Source("tiny", "someone/tiny", "someone/tiny", ("config.json", "model-0000?-of-0000?.safetensors"), 1, "MIT")
COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks for: the repository, its files, what it knows about paths."""

    lies = False
    asked: list[str] = []

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        if path.startswith("/api/models/someone/tiny"):
            info = {"id": "someone/tiny", "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            tree = [self.entry(name) for name in FILES]
            body = tree if "/tree/" in path else info
            self._send(json.dumps(body).encode(), {"Content-Type": "application/json"})
            return
        body = FILES.get(path.rpartition("/")[2])
        if body is None or "/resolve/" not in path:
            self._send(b"", {}, 404)
            return
        etag = hashlib.sha256(body).hexdigest()
        self._send(body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._send(json.dumps([self.entry(name) for name in FILES]).encode(), {"Content-Type": "application/json"})

    def entry(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "file", "path": name, "size": len(FILES[name]), "oid": "0" * 40}
        if name.endswith(".safetensors"):
            digest = "0" * 64 if self.lies else hashlib.sha256(FILES[name]).hexdigest()
            found["lfs"] = {"oid": digest, "size": len(FILES[name]), "pointerSize": 1}
        return found


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.setattr(Hub, "lies", False)
    monkeypatch.setattr(Hub, "asked", [])
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def quiet(_: str) -> None:
    pass


def test_nothing_is_fetched_before_its_licence_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(ModelsError, match=r"tiny \(someone/tiny\): MIT, about 1 MB\n.*--accept-licence"):
        fetch([SOURCE], tmp_path, is_accepted=False, say=quiet)
    assert not list(tmp_path.iterdir())


def test_fetch_brings_the_named_files_only_and_their_sums(hub: str, tmp_path: Path) -> None:
    fetch([SOURCE], tmp_path, endpoint=hub, is_accepted=True, say=quiet)
    state = state_of(SOURCE, tmp_path)
    assert state.text == "complete" and len(state.present) == 3
    assert not (tmp_path / "tiny" / "README.md").exists()
    assert verify([SOURCE], tmp_path) == []
    (tmp_path / "tiny" / "config.json").write_bytes(b"{ }")
    assert verify([SOURCE], tmp_path) == [f"{tmp_path}/tiny/config.json: differs from SHA256SUMS"]


def test_what_is_complete_is_not_asked_for_again(hub: str, tmp_path: Path) -> None:
    fetch([SOURCE], tmp_path, endpoint=hub, is_accepted=True, say=quiet)
    Hub.asked.clear()
    fetch([SOURCE], tmp_path, endpoint=hub, is_accepted=True, say=quiet)
    assert not Hub.asked


def test_a_fetch_that_broke_off_goes_on_with_what_is_missing(hub: str, tmp_path: Path) -> None:
    fetch([SOURCE], tmp_path, endpoint=hub, is_accepted=True, say=quiet)
    (tmp_path / "tiny" / "model-00002-of-00002.safetensors").unlink()
    assert state_of(SOURCE, tmp_path).missing == ("model-00002-of-00002.safetensors",)
    Hub.asked.clear()
    fetch([SOURCE], tmp_path, endpoint=hub, is_accepted=True, say=quiet)
    assert verify([SOURCE], tmp_path) == []
    fetched = [asked.rpartition("/")[2] for asked in Hub.asked if asked.startswith("GET") and "/resolve/" in asked]
    assert fetched == ["model-00002-of-00002.safetensors"]


def test_a_file_that_is_not_what_the_hub_says_is_refused(
    hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "lies", True)
    with pytest.raises(ModelsError, match=r"model-0000\d-of-00002\.safetensors: sha256 is .* the hub says 0000"):
        fetch([SOURCE], tmp_path, endpoint=hub, is_accepted=True, say=quiet)


def test_a_hub_that_is_not_there_says_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(ModelsError, match=r"(?s)tiny: .*run again to go on from here"):
        fetch([SOURCE], tmp_path, endpoint="http://127.0.0.1:9", is_accepted=True, say=quiet)


def test_a_library_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ModelsError, match=r"huggingface_hub is not installed: pip install 'minmo-agent\[public\]'"):
        fetch([SOURCE], tmp_path, is_accepted=True, say=quiet)
    with pytest.raises(ModelsError, match="hub 'ftp': must be huggingface or modelscope"):
        fetch([SOURCE], tmp_path, hub="ftp", is_accepted=True, say=quiet)


def folder_of(root: Path) -> Path:
    given = root / "given"
    given.mkdir()
    for name, body in FILES.items():
        (given / name).write_bytes(body)
    return given


def test_a_folder_from_another_machine_is_imported_and_verified(tmp_path: Path) -> None:
    given = folder_of(tmp_path)
    import_folder([SOURCE], given, tmp_path / "models", is_accepted=True, say=quiet)
    assert verify([SOURCE], tmp_path / "models") == []
    again = tmp_path / "again"
    import_folder([SOURCE], tmp_path / "models", again, is_accepted=True, say=quiet)  # one folder per source
    assert state_of(SOURCE, again).text == "complete"
    (tmp_path / "models" / "tiny" / "config.json").write_bytes(b"broken")
    with pytest.raises(ModelsError, match="config.json differ from SHA256SUMS there: broken on the way"):
        import_folder([SOURCE], tmp_path / "models", again, is_accepted=True, say=quiet)


def test_an_import_that_lacks_a_file_or_a_shard_names_it(tmp_path: Path) -> None:
    given = folder_of(tmp_path)
    (given / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ModelsError, match=r"has no model-00002-of-00002\.safetensors of tiny"):
        import_folder([SOURCE], given, tmp_path / "models", is_accepted=True, say=quiet)
    (given / "config.json").unlink()
    with pytest.raises(ModelsError, match=r"has no config\.json"):
        import_folder([SOURCE], given, tmp_path / "models", is_accepted=True, say=quiet)


def test_names_of_profiles_and_sources_are_understood_others_refused_with_them() -> None:
    names = [source.name for source in wanted_sources(["public", "sensevoice-small"])]
    assert names == ["qwen2.5-7b-instruct", "sensevoice-small", "cosyvoice2-0.5b"]
    with pytest.raises(ModelsError, match="'llama': must be one of public, nano, minmo-8b.*sensevoice-small"):
        wanted_sources(["llama"])
    assert models.licence_text(wanted_sources(["minmo-small"])).count("Apache-2.0") == 2
