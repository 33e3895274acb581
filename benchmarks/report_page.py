"""How soon the page answers: size, first paint and the longest tasks of the main thread, in Chromium without a debugger attached.

A debugger collects source positions and makes tasks twice as long, so the page reports on itself: it is served from this machine with a few
lines that post what the browser's own observer saw. Run: python benchmarks/report_page.py REPORT.html [--runs 3]
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from argparse import ArgumentParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PROBE = """<script>window.seen=[];new PerformanceObserver(l=>{for(const e of l.getEntries())seen.push([e.startTime,e.duration])})
.observe({type:"longtask",buffered:true});setTimeout(()=>fetch("/seen",{method:"POST",body:JSON.stringify({tasks:seen,
load:performance.getEntriesByType("navigation")[0].loadEventEnd,paint:performance.getEntriesByName("first-contentful-paint")[0].startTime,ready:document.documentElement.dataset.ready})}),6000)</script>"""


def measure(page: str, chromium: str) -> dict:
    # the policy of the page forbids both the probe and its answer
    content = re.sub("<meta http-equiv[^>]*>", "", page).replace("<title>", PROBE + "<title>", 1).encode("utf-8")
    found, done = {}, threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(content if self.path == "/" else b"")

        def do_POST(self):
            found.update(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            done.set()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory() as profile:
        url = f"http://127.0.0.1:{server.server_port}/"
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
        ]
        process = subprocess.Popen([chromium, *flags, url], stderr=subprocess.DEVNULL)
        done.wait(60)
        process.kill()
        process.wait()
    server.shutdown()
    server.server_close()
    return found


def main(path: str, runs: int) -> None:
    page = Path(path).read_text("utf-8")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("chromium is needed")
    print(
        f"{path}: {len(page.encode()) / 1e6:.2f} MB, of which plotting library {len(re.search(r'<script>(/[*][*].*?)</script>', page, re.DOTALL)[1]) / 1e6:.2f} MB"
    )
    for run in range(runs):
        found = measure(page, chromium)
        tasks = [duration for _, duration in found["tasks"]]
        print(
            f"run {run}: first contentful paint {found['paint']:.0f} ms, loaded after {found['load']:.0f} ms; {len(tasks)} tasks over 50 ms, longest {max(tasks, default=0):.0f} ms; "
            f"all charts drawn: {found.get('ready') == 'true'}"
        )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("page")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    main(args.page, args.runs)
