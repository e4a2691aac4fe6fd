#!/usr/bin/env python3
"""A small web server with ranges, for tests, on 127.0.0.1: serves one folder, and fails as it is told.

    ranges.py FOLDER --port N [--tls CERTIFICATE KEY] [--user NAME:PASSWORD] [--log FILE]

What a request's path begins with says how it is answered:

    /plain/...      as it should be
    /weak/...       with a weak entity tag
    /untagged/...   without entity tag and time of change
    /whole/...      without ranges: the whole file
    /slow/...       after 50 ms
    /flaky/...      every third request fails in turn: status 503, a closed connection, half of the bytes
    /broken/...     after the first request all fail with status 500
    /changing/...   as another file with the same length after four requests
    /shrinking/...  shorter after four requests
    /liar/...       with a Content-Range of other bytes
    /endless/...    with a header without an end
    /garbage/...    with bytes that are no HTTP
    /drip/...       a byte a second, for good
    /more/...       with more bytes than the range has
    /gzip/...       as if it were compressed
    /hop/...        redirected to /plain/
    /loop/...       redirected to itself
    /away/...       redirected to file:///etc/passwd
    /elsewhere/PORT/...  redirected to the same path at another server
"""
import argparse
import base64
import email.utils
import os
import pathlib
import ssl
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    counts = {}
    lock = threading.Lock()

    def log_message(self, *_):
        pass

    def count(self):
        with self.lock:
            self.counts[self.path] = self.counts.get(self.path, 0) + 1
            return self.counts[self.path]

    def refuse(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self):
        number = self.count()
        options = self.server.options
        if options.log:
            with self.lock, open(options.log, "a", encoding="utf-8") as log:
                log.write(f"{self.path} {self.headers.get('Range')} {self.headers.get('Authorization')} "
                          f"{self.headers.get('X-Test')}\n")
        if options.user:
            wanted = "Basic " + base64.b64encode(options.user.encode()).decode()
            if self.headers.get("Authorization") != wanted:
                return self.refuse(401, WWW_Authenticate='Basic realm="test"')
        kind, _, name = self.path.lstrip("/").split("?")[0].partition("/")
        if kind == "hop":
            return self.refuse(302, Location=f"/plain/{name}")
        if kind == "loop":
            return self.refuse(302, Location=self.path)
        if kind == "away":
            return self.refuse(302, Location="file:///etc/passwd")
        if kind == "elsewhere":
            port, _, rest = name.partition("/")
            return self.refuse(302, Location=f"http://127.0.0.1:{port}/plain/{rest}")
        file = pathlib.Path(options.folder, name).resolve()
        if not file.is_relative_to(pathlib.Path(options.folder).resolve()) or not file.is_file():
            return self.refuse(404)
        self.answer(kind, file, number)

    def answer(self, kind, file, number):
        size, modified = file.stat().st_size, file.stat().st_mtime
        tag = f'"{size}-{int(modified)}"'
        if kind == "slow":
            time.sleep(0.05)
        if kind == "garbage":
            self.wfile.write(os.urandom(300))
            self.close_connection = True
            return
        if kind == "broken" and number > 1:
            return self.refuse(500)
        if kind == "flaky" and number % 3 == 0:
            if number % 9 == 0:
                return self.refuse(503, Retry_After="0")
            if number % 9 == 3:
                self.close_connection = True
                return self.connection.close()
        if kind in ("changing", "shrinking") and number > 4:
            tag = '"other"'
            modified += 100
            size -= 512 if kind == "shrinking" else 0
        if kind == "weak":
            tag = "W/" + tag
        self.send_range(kind, file, size, tag, email.utils.formatdate(modified, usegmt=True), number)

    def send_range(self, kind, file, size, tag, modified, number):
        first, last = 0, size - 1
        given = self.headers.get("Range", "")
        condition = self.headers.get("If-Range")
        partial = kind != "whole" and given.startswith("bytes=") and condition in (None, tag, modified)
        if partial:
            start, _, end = given[6:].partition("-")
            first, last = int(start), min(int(end or size - 1), size - 1)
            if first >= size:
                return self.refuse(416, Content_Range=f"bytes */{size}")
        count = last - first + 1
        self.send_response(206 if partial else 200)
        if kind != "untagged":
            self.send_header("ETag", tag)
            self.send_header("Last-Modified", modified)
        if kind == "gzip":
            self.send_header("Content-Encoding", "gzip")
        if kind == "endless":
            self.flush_headers()
            while True:
                self.wfile.write(b"X-Line: " + b"x" * 1000 + b"\r\n")
        if partial:
            shift = 512 if kind == "liar" else 0
            self.send_header("Content-Range", f"bytes {first + shift}-{last + shift}/{size + shift}")
        more = 1000 if kind == "more" else 0
        self.send_header("Content-Length", str(count + more))
        self.end_headers()
        with open(file, "rb") as content:
            content.seek(first)
            if kind == "drip":
                while True:
                    self.wfile.write(content.read(1) or b"x")
                    time.sleep(1)
            half = kind == "flaky" and number % 9 == 6
            left = count // 2 if half else count
            while left > 0 and (bytes_ := content.read(min(left, 1 << 20))):
                self.wfile.write(bytes_)
                left -= len(bytes_)
            self.wfile.write(b"y" * more)
            if half:
                self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, *_):
        pass


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--tls", nargs=2)
    parser.add_argument("--user")
    parser.add_argument("--log")
    options = parser.parse_args()
    server = Server(("127.0.0.1", options.port), Handler)
    server.options = options
    if options.tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*options.tls)
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    # Ends by itself if a test forgets it.
    threading.Timer(600, lambda: os._exit(0)).start()
    server.serve_forever()


main()
