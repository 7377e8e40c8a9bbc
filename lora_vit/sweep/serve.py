"""``lora-vit sweep NAME --serve``: the page of a sweep while it runs, made from its records when somebody asks for it.

This machine alone is answered, and only under its own names, so that no other site's name leads here. Files are read,
none is served or written.
"""

import contextlib
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

import jinja2
from markupsafe import Markup

from lora_vit.analysis import summarize
from lora_vit.analysis.export import html_report
from lora_vit.analysis.plots import STYLE, draw_all, render
from lora_vit.errors import ConfigError, UserError, line_of
from lora_vit.records import PLAN, RECORD
from lora_vit.sweep.plan import Sweep
from lora_vit.sweep.view import header, standing
from lora_vit.terminal import from_here

SHARE = 0.2  # of a core, what making pages takes at most
HERE = Path(__file__).parent
LIVE = Markup('<p class="note" id="live" data-ended="{}">{}</p><script>{}</script>')


class Page:
    """The page of a sweep as its records stand: at first its trials, with the first figure the whole summary."""

    def __init__(self, folder: Path):
        self.sweep, self._text, self._lock, self._due = Sweep(folder), "", Lock(), 0.0
        self._seen: list[Any] = []  # the plan and the records as they were when the text was made
        self._under: Callable[[Markup], str] = self._trials  # makes the text, below a line on how far the sweep is

    def newest(self) -> str:
        """The page, made anew if records have changed; meanwhile, and for some seconds, others get the last one."""
        if self._lock.acquire(blocking=not self._text):
            try:
                if time.monotonic() >= self._due:
                    start = time.thread_time()
                    self._refresh()
                    self._due = time.monotonic() + (time.thread_time() - start) / SHARE
            finally:
                self._lock.release()
        return self._text

    def _refresh(self) -> None:
        sweep, folder, problem = self.sweep, self.sweep.folder, ""
        try:
            files = [*folder.glob(PLAN), *folder.glob(f"*/{RECORD}")]
            seen = [time.time() // 300, *((file, file.stat().st_mtime_ns) for file in files)]  # silence is seen too
            if seen == self._seen:
                return
            self._seen = seen
            sweep.refresh()
            self._states = standing(sweep)
            summary = summarize(folder)
            pictures = {name: render(figure, "svg") for name, figure in draw_all(summary).items()}
            self._under = partial(html_report, summary, pictures, f"python -m lora_vit.summarize {from_here(folder)}")
        except (UserError, OSError) as error:
            problem = f"; not in this page yet: {line_of(error)}"
        ended = sum(state.ended for state, _ in self._states)
        total, clock = max(len(self._states), (sweep.search or {"trials": 0})["trials"]), time.strftime("%H:%M:%S")
        raced = not sweep.race or (not problem and summary.race is not None and summary.race.ended)
        over = bool(sweep.trials) and ended == total and raced
        line = f"All {total} trials have ended; read at" if over else f"{ended} of {total} trials; refreshed"
        script = Markup((HERE / "serve.js").read_text(encoding="utf-8"))
        self._text = self._under(LIVE.format(over, f"{line} {clock}{problem if ended else ''}", script))

    def _trials(self, live: Markup) -> str:
        folders = jinja2.FileSystemLoader([HERE, STYLE.parent])
        page = jinja2.Environment(loader=folders, autoescape=True).get_template("serve.html.j2")
        rows = [row for _, row in self._states]
        return page.render(title=self.sweep.folder.name, live=live, header=header(self.sweep.metric), rows=rows)


def serve(folder: Path, port: int) -> None:
    """Answer until Ctrl-C; port 0 is any free one. Raises ConfigError where the port cannot be had."""
    page = Page(folder)

    class Answer(BaseHTTPRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(ConnectionError):  # the reader has gone
                super().handle()

        def do_GET(self) -> None:
            if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
                self.send_error(403, "Ask for 127.0.0.1 or localhost")
            elif self.path != "/":
                self.send_error(404)
            else:
                body = page.newest().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
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
