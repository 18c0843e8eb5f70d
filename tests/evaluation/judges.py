"""Judges for tests: a small server in OpenAI's format, with whatever opinion it is given."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class JudgeServer:
    """What it was asked, and where it is."""

    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


@contextmanager
def judge_server(
    opinion: Callable[[str], str], failures: int = 0, status: int = 503, body: bytes | None = None, echo: bool = False
) -> Iterator[JudgeServer]:
    """`opinion`: prompt -> what it says; the first `failures` requests get `status` instead; all get `body` if given.

    `echo`: errors and opinions repeat the header with the key, as some proxies do.
    """
    seen, lock = JudgeServer(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                seen.requests.append(asked)
                seen.keys.append(self.headers["Authorization"])
                failed = len(seen.requests) <= failures
            echoed = f" (headers: {{'Authorization': '{self.headers['Authorization']}'}})" if echo else ""
            message = {"role": "assistant", "content": opinion(asked["messages"][0]["content"]) + echoed}
            answer = {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": asked["model"],
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            }
            self.reply(status if failed else 200, {"error": {"message": "busy" + echoed}} if failed else answer)

        def reply(self, code: int, content: dict[str, Any]) -> None:
            text = json.dumps(content).encode() if body is None else body
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.send_header("retry-after-ms", "10")  # the client waits no longer than that
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    seen.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield seen
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
