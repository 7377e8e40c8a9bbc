"""``lora-vit sweep NAME --serve``: the page of a sweep while it runs, made from its records when a browser asks.

This machine alone is answered, and only under its own names, so that no other site's name leads here. Files are read,
none is served or written.
"""

import contextlib
import functools
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

from lora_vit.analysis.core import summarize
from lora_vit.analysis.export import html_report, page
from lora_vit.analysis.plots import render
from lora_vit.errors import ConfigError, UserError, line_of
from lora_vit.records import PLAN, RECORD
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.view import header, standing
from lora_vit.terminal import from_here


def newest(sweep: Sweep) -> str:
    """The page, made again if plan or records have changed, and every five minutes: so a silent worker is shown."""
    files = [*sweep.folder.glob(PLAN), *sweep.folder.glob(f"*/{RECORD}")]
    return make_page(sweep, (len(files), sum(file.stat().st_mtime_ns for file in files), time.monotonic() // 300))


@functools.lru_cache(1)
def make_page(sweep: Sweep, stand: tuple[float, ...]) -> str:
    """The whole summary; the trials and why, where they cannot be compared. ``stand`` tells the newest page from it."""
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
    return html_report(summary, pictures, f"lora-vit summarize {from_here(sweep.folder)}", live)


def serve(folder: Path, port: int) -> None:
    """Answer until Ctrl-C; port 0 is any free one. Raises ConfigError where the port cannot be had."""
    sweep = Sweep(folder)

    class Answer(BaseHTTPRequestHandler):
        timeout = 1.0  # seconds: one is answered after another, and browsers open connections that they do not use

        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the reader has gone
                super().handle()

        def do_GET(self) -> None:
            known = self.headers.get("Host", "").partition(":")[0] in ("127.0.0.1", "localhost")
            if not known or self.path != "/":
                return self.send_error(404 if known else 403)
            body = newest(sweep).encode()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *said: object) -> None:
            """No line for each request."""

    try:
        server = HTTPServer(("127.0.0.1", port), Answer)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--serve {port}: the port cannot be had ({error}): give another one, or none") from None
    with server:
        print(f"http://127.0.0.1:{server.server_port}/ shows {from_here(folder)} until Ctrl-C", flush=True)
        server.serve_forever()
