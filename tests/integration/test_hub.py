"""Weights by their id on Hugging Face's hub: from a server that answers as the hub does, then without one."""

from __future__ import annotations

import hashlib
import http.server
import json
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import run
from safetensors.torch import save_file

timm = pytest.importorskip("timm")
pytest.importorskip("huggingface_hub")
REVISION = "1" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """The repository org/vit, whose files are those of a folder."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        name, data = self.path.partition("?")[0], None
        self.asked.append(name)
        files = list(self.folder.iterdir())
        if name.startswith("/api/models/org/vit/tree/"):
            listed = [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files]
            data = json.dumps(listed).encode()
        elif name.startswith("/api/models/org/vit/"):
            siblings = [{"rfilename": f.name} for f in files]
            data = json.dumps({"id": "org/vit", "sha": REVISION, "siblings": siblings}).encode()
        elif name.startswith("/org/vit/resolve/"):
            data = (self.folder / Path(name).name).read_bytes()
        self.send_response(404 if data is None else 200)
        self.send_header("Content-Length", str(len(data or b"")))
        self.send_header("ETag", f'"{hashlib.sha256(data or b"").hexdigest()}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if data is not None and self.command == "GET":
            self.wfile.write(data)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path) -> Iterator[http.server.ThreadingHTTPServer]:
    Hub.folder, Hub.asked = tmp_path / "repository", []
    Hub.folder.mkdir()
    save_file({k: t.contiguous() for k, t in timm.create_model("test_vit").state_dict().items()},
              Hub.folder / "model.safetensors")  # fmt: skip
    (Hub.folder / "config.json").write_text('{"architecture": "test_vit2"}')
    (Hub.folder / "pytorch_model.bin").write_bytes(b"may hold code")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever).start()
        yield server
        server.shutdown()


def test_weights_by_their_id(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.server_port}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    common = ["data=digits", "model=timm", "model.name=test_vit", "model.image_size=16", "trainer.epochs=1"]

    def fetched(weights: str) -> tuple[int, str, str]:
        line = [sys.executable, "-m", "lora_vit.fetch", *common, f"model.weights={weights}"]
        done = run(line, tmp_path)
        return done.returncode, done.stdout, "".join(done.stderr.splitlines()[-1:])

    code, _, said = fetched("hf_hub:org/cat")
    assert (code, said.startswith("error: model.weights=hf_hub:org/cat"), "into a folder" in said) == (1, True, True)
    for revision in ("main", REVISION):
        code, out, said = fetched(f"hf_hub:org/vit@{revision}")
        assert (code, f"/snapshots/{REVISION} " in out) == (0, True), said
    assert {Path(name).name for name in Hub.asked if "/resolve/" in name} == {"model.safetensors", "config.json"}
    hub.shutdown()
    line = [sys.executable, "-m", "lora_vit.train", *common, "model.weights=hf_hub:org/vit", "hydra.run.dir=run"]
    done = run(line, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 blocks of width 64, patch 16" in done.stdout
    assert "model.name is test_vit2 beside the weights, test_vit here" in done.stdout
