"""``lora-vit sweep NAME --serve``: the page of a sweep while it runs, made from its records when somebody asks for it.

This machine alone is answered, and only under its own names, so that no other site's name leads here. Files are read,
none is served or written.
"""

import contextlib
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from lora_vit.analysis import summarize
from lora_vit.analysis.export import html_report, page
from lora_vit.analysis.plots import render
from lora_vit.errors import ConfigError, UserError, line_of
from lora_vit.records import PLAN, RECORD
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.view import header, standing
from lora_vit.terminal import from_here

REST = 4  # times as long as a page took, before the next one: training has the machine


class Pages:
    """The newest page of a sweep: made anew, by one thread at a time, if records have changed."""

    def __init__(self, folder: Path):
        self.sweep, self._text, self._lock, self._due = Sweep(folder), "", Lock(), 0.0
        self._seen: list[Any] = []  # the plan and the records of that text

    def newest(self) -> str:
        with self._lock:
            files = [*self.sweep.folder.glob(PLAN), *self.sweep.folder.glob(f"*/{RECORD}")]
            start = time.monotonic()
            if start >= self._due:
                seen = [start // 300, *((file, file.stat().st_mtime_ns) for file in files)]  # silence is seen too
                self._text = self._text if seen == self._seen else make_page(self.sweep)
                self._seen, self._due = seen, time.monotonic() + REST * (time.monotonic() - start)
            return self._text


def make_page(sweep: Sweep) -> str:
    """The whole summary; the trials as they stand and why, where they cannot be compared."""
    summary, problem = None, ""
    try:
        sweep.refresh()
        summary = summarize(sweep.folder)
    except (UserError, OSError) as error:
        problem = f"; not compared: {line_of(error)}"
    states = standing(sweep)
    ended, total = sum(state.ended for state, _ in states), max(len(states), (sweep.search or {"trials": 0})["trials"])
    over = ended == total > 0 and (not sweep.race or bool(summary and summary.race and summary.race.ended))
    line = f"All {total} trials have ended; read at" if over else f"{ended} of {total} trials; refreshed"
    live = {"over": over, "text": f"{line} {time.strftime('%H:%M:%S')}{problem * bool(ended)}"}
    if summary is None:
        rows = [row for _, row in states]
        return page("waiting", title=sweep.folder.name, live=live, header=header(sweep.metric), rows=rows)
    pictures = {name: render(figure, "svg") for name, figure in summary.figures.items()}
    return html_report(summary, pictures, f"python -m lora_vit.summarize {from_here(sweep.folder)}", live)


def serve(folder: Path, port: int) -> None:
    """Answer until Ctrl-C; port 0 is any free one. Raises ConfigError where the port cannot be had."""
    pages = Pages(folder)

    class Answer(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the reader has gone
                super().handle()

        def do_GET(self) -> None:
            known = self.headers.get("Host", "").partition(":")[0] in ("127.0.0.1", "localhost")
            if not known or self.path != "/":
                return self.send_error(404 if known else 403)
            body = pages.newest().encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *said: object) -> None:
            """No line for each request."""

    try:
        server = ThreadingHTTPServer(("127.0.0.1", port), Answer)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--serve {port}: the port cannot be had ({error}): give another one, or none") from None
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ shows {from_here(folder)} until Ctrl-C", flush=True)
        server.serve_forever()
