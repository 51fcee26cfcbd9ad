"""A hub id: fetched from a stand-in for the hub on this machine, weights and small files only."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"a pickle, never fetched",
    "modeling.py": b"code, never fetched",
    "tokenizer.json": b"{}",
}


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers what huggingface_hub asks: the list of files of a model, and each file."""

    asked: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        name = path.rsplit("/", 1)[-1]
        if path.startswith("/api/models/owner/tiny/tree/"):
            files = [{"type": "file", "path": file, "size": len(held), "oid": "0"} for file, held in FILES.items()]
            content, kind = json.dumps(files).encode(), "json"
        elif path.startswith("/api/models/owner/tiny"):
            siblings = [{"rfilename": file} for file in FILES]
            content, kind = json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode(), "json"
        elif path.startswith("/owner/tiny/resolve/") and name in FILES:
            self.asked.append(name)
            content, kind = FILES[name], "octet-stream"
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Type", f"application/{kind}")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def locate(model, endpoint, home):
    script = f"from jaxcrit.models.checkpoint import locate; print(locate({model!r}))"
    local = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "*"}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **local})


def test_a_hub_id_is_fetched_without_pickles_and_code(hub, tmp_path):
    done = locate("owner/tiny", hub, tmp_path)
    assert done.returncode == 0, done.stderr
    fetched = {file.name for file in Path(done.stdout.strip()).iterdir()}
    assert fetched == {"config.json", "model.safetensors", "tokenizer.json"}
    assert not {"pytorch_model.bin", "modeling.py"} & set(Hub.asked)


def test_a_hub_that_does_not_answer_is_a_user_error(tmp_path):
    done = locate("owner/absent", "http://127.0.0.1:9", tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError" in last and "owner/absent" in last and "the hub did not give it" in last
