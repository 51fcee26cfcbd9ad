"""A stand-in for Google Cloud Storage on this machine: as much of its JSON API as gcsfs, tensorstore and orbax use."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class FakeStorage(ThreadingHTTPServer):
    """Buckets by name, each with objects by name: (generation, content).

    Attributes:
        refused: by bucket, methods that are answered with 403, such as ``POST``; ``BUCKET`` for a look at the bucket.
        puts: names of the objects in the order they were put.
    """

    daemon_threads = True

    def __init__(self, *buckets: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in buckets}
        self.refused: dict[str, set[str]] = {}
        self.puts: list[str] = []
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def handle_error(self, *_: object) -> None:
        """Clients hang up on what they no longer want to know."""

    def environment(self, home: str) -> dict[str, str]:
        """What makes clients use it, and look for no account on the machine."""
        address = f"http://127.0.0.1:{self.server_port}"
        return {
            "STORAGE_EMULATOR_HOST": address,
            "TENSORSTORE_GCS_HTTP_URL": address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "project",
            "NO_GCE_CHECK": "true",
            "HOME": home,
            "CLOUDSDK_CONFIG": home,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks over gRPC what kind of bucket it is
        }

    def files(self, prefix: str) -> dict[str, bytes]:
        """Contents below ``BUCKET/DIR/``, by what follows."""
        bucket, _, folder = prefix.partition("/")
        return {
            name.removeprefix(folder): content
            for name, (_, content) in sorted(self.buckets[bucket].items())
            if name.startswith(folder)
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FakeStorage

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, content: bytes | dict = b"", **headers: str) -> None:
        if status >= 400:
            content = {"error": {"code": status, "message": content or "not found"}}
        body = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header(
            "Content-Type", "application/json" if isinstance(content, dict) else "application/octet-stream"
        )
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_any(self) -> None:
        body = self.read_body()
        url = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(url.query).items()}
        found = re.fullmatch(r"(?:/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.+))?)?", url.path)
        assert found, self.path
        bucket, objects, name = found[1], found[2], unquote(found[3] or "")
        with self.server.lock:
            if bucket not in self.server.buckets:
                self.answer(404, "The specified bucket does not exist.")
            elif self.command in self.server.refused.get(bucket, ()):
                self.answer(403, "robot does not have storage.objects.create access")
            elif objects is None and "BUCKET" in self.server.refused.get(bucket, ()):
                self.answer(403, "robot does not have storage.buckets.get access")
            elif objects is None:
                self.answer(200, {"kind": "storage#bucket", "name": bucket})
            elif self.command == "GET":
                self.get(bucket, name, asked) if name else self.list(bucket, asked)
            elif self.command == "DELETE":
                gone = self.server.buckets[bucket].pop(name, None)
                self.answer(404 if gone is None else 204)
            elif "upload_id" in asked:
                self.resume(bucket, asked["upload_id"], body)
            else:
                self.put(bucket, asked, body)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def about(self, bucket: str, name: str) -> dict:
        generation, content = self.server.buckets[bucket][name]
        digest = base64.b64encode(hashlib.md5(content).digest()).decode()
        return {
            "kind": "storage#object",
            "bucket": bucket,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": digest,
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def get(self, bucket: str, name: str, asked: dict[str, str]) -> None:
        if name not in self.server.buckets[bucket]:
            self.answer(404, f"No such object: {bucket}/{name}")
            return
        generation, content = self.server.buckets[bucket][name]
        if asked.get("ifGenerationNotMatch") == str(generation):
            self.answer(304)
        elif asked.get("ifGenerationMatch", str(generation)) != str(generation):
            self.answer(412, "conditionNotMet")
        elif asked.get("alt") != "media":
            self.answer(200, self.about(bucket, name))
        elif wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            start = int(wanted[1]) if wanted[1] else len(content) - int(wanted[2])
            stop = min(int(wanted[2]) + 1 if wanted[1] and wanted[2] else len(content), len(content))
            if start >= len(content):
                self.answer(416, "The requested range cannot be satisfied.")
            else:
                self.answer(
                    206,
                    content[start:stop],
                    x_goog_generation=str(generation),
                    Content_Range=f"bytes {start}-{stop - 1}/{len(content)}",
                )
        else:
            self.answer(200, content, x_goog_generation=str(generation))

    def list(self, bucket: str, asked: dict[str, str]) -> None:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.server.buckets[bucket]):
            if not name.startswith(prefix) or name < asked.get("startOffset", ""):
                continue
            if "endOffset" in asked and name >= asked["endOffset"]:
                continue
            head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(self.about(bucket, name))
        self.answer(200, {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)})

    def put(self, bucket: str, asked: dict[str, str], body: bytes) -> None:
        name = asked.get("name", "")
        if asked["uploadType"] == "multipart":
            boundary = re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            _, described, content, _ = re.split(rb"(?:^|\r?\n)--" + re.escape(boundary) + rb"(?:--)?(?:\r?\n)?", body)
            described, content = (re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (described, content))
            name, body = json.loads(described)["name"], content
        if asked["uploadType"] == "resumable":
            upload = str(next(self.server.generations))
            self.server.uploads[upload] = (bucket, name, bytearray())
            where = f"http://{self.headers['Host']}/upload/storage/v1/b/{bucket}/o?upload_id={upload}"
            self.answer(200, {}, Location=where)
            return
        generation = self.server.buckets[bucket].get(name, (0, b""))[0]
        if asked.get("ifGenerationMatch", str(generation)) != str(generation):
            self.answer(412, "conditionNotMet")
            return
        self.keep(bucket, name, body)

    def resume(self, bucket: str, upload: str, body: bytes) -> None:
        _, name, content = self.server.uploads[upload]
        content += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or len(content) < int(total):
            self.answer(308, Range=f"bytes=0-{len(content) - 1}")
        else:
            self.keep(bucket, name, bytes(content))

    def keep(self, bucket: str, name: str, content: bytes) -> None:
        self.server.buckets[bucket][name] = (next(self.server.generations), content)
        self.server.puts.append(name)
        self.answer(200, self.about(bucket, name))
