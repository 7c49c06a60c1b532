"""A small HTTP server that serves one body in ranges, and a plain `Origin` for it."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RangeServer:
    """`url` serves `body` under the ETag `etag`; `requests` keeps the Range headers that came."""

    def __init__(self, body, etag='"v1"', rate=None):
        self.body, self.etag, self.requests, self.sent = body, etag, [], 0
        self._link = threading.Lock()  # all answers share `rate` bytes a second
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one write: else Nagle and delayed ACKs add 40 ms to each

            def do_GET(self):
                outer.requests.append(self.headers["Range"])
                if self.headers.get("If-Match", outer.etag) != outer.etag:
                    return self._answer(412, b"", {})
                if outer.body is None:
                    return self._answer(404, b"<Code>NoSuchKey</Code>", {})
                first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
                data = outer.body[first : last + 1]
                ranged = f"bytes {first}-{first + len(data) - 1}/{len(outer.body)}"
                return self._answer(206, data, {"Content-Range": ranged, "ETag": outer.etag})

            def _answer(self, status, data, headers):
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if rate is None:
                    self.wfile.write(data)
                    return
                self.wfile.flush()
                for at in range(0, len(data), 100):
                    with outer._link:
                        time.sleep(len(data[at : at + 100]) / rate)
                        outer.sent += len(data[at : at + 100])
                    self.wfile.write(data[at : at + 100])
                    self.wfile.flush()

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_):
                pass  # clients that hang up are what these tests are about

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class PlainOrigin:
    """Ranges of `url`, pinned to an ETag, unsigned."""

    name = "the test object"

    def __init__(self, url, etag='"v1"'):
        self.url, self.etag, self.renewals = url, etag, 0

    def request(self, first, last, *, renew=False):
        self.renewals += renew
        return f"{self.url}/object", {"Range": f"bytes={first}-{last}", "If-Match": self.etag}
