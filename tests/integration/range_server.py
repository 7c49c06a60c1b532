"""An HTTP server of one body in ranges, and an unsigned `Origin` for it."""

import threading
import time

from tests.http_server import QuietHandler, http_server


class RangeServer:
    """`url` serves `body` under the ETag `etag`; `requests` records the Range headers."""

    def __init__(self, body, etag='"v1"', rate=None):
        self.body, self.etag, self.requests, self.sent = body, etag, [], 0
        self._link = threading.Lock()  # all answers share `rate` bytes per second
        outer = self

        class Handler(QuietHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 1 << 16  # head and body in one write; otherwise Nagle and delayed ACKs add 40 ms to each

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

        self._serving = http_server(Handler)

    def __enter__(self):
        self.port = self._serving.__enter__()
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    def __exit__(self, *exception):
        self._serving.__exit__(*exception)


class PlainOrigin:
    """Requests ranges of `url` with an ETag and without a signature."""

    name = "the test object"

    def __init__(self, url, etag='"v1"'):
        self.url, self.etag, self.renewals = url, etag, 0

    def request(self, first, last, *, renew=False):
        self.renewals += renew
        return f"{self.url}/object", {"Range": f"bytes={first}-{last}", "If-Match": self.etag}
