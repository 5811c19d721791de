"""A test server that speaks the OpenAI protocol, well or badly."""

import collections
import http.server
import json
import threading
import time


class Server:
    """An OpenAI-compatible server whose `behave(prompt, nth time it is asked, body)` says how each request goes wrong.

    behave -> None (a good reply), an HTTP status, (status, headers[, body]), a body, or a named fault.
    """

    def __init__(self, behave):
        self.asked, self.bodies, self.headers, self.times = collections.Counter(), [], [], []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
                server.asked[prompt] += 1
                server.bodies.append(body)
                server.headers.append({k.lower(): v for k, v in self.headers.items()})
                server.times.append(time.monotonic())
                server.answer(self, behave(prompt, server.asked[prompt], body), f"echo {prompt}")

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda request, address: None  # clients that give up are the point here
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, handler, fault, text):
        if fault == "silence":
            return time.sleep(2)
        fault = (fault, {}) if isinstance(fault, int) else (200, {}, fault) if isinstance(fault, bytes) else fault
        status, headers, *body = fault if isinstance(fault, tuple) else (200, {}, chat(text))
        body = body[0] if body else b'{"error": {"message": "no"}}'
        length = 2**30 if fault == "flood" else len(body)
        handler.send_response(status)
        quick = {"Retry-After-Ms": "20"} if status >= 400 and not headers else {}
        known = {"content-type": "application/json", "content-length": str(length)}
        for name, value in (known | quick | headers).items():
            handler.send_header(name, value)
        handler.end_headers()
        if fault == "flood":
            for _ in range(64):
                handler.wfile.write(b" " * 2**20)
        return handler.wfile.write(body[: len(body) // 2] if fault == "half" else body)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.http.shutdown()
        self.http.server_close()


def chat(*texts):
    choices = [{"index": i, "message": {"content": t}, "finish_reason": "stop"} for i, t in enumerate(texts)]
    return json.dumps({"choices": choices}).encode()
