"""``lora-vit sweep NAME --serve`` beside real training: the page follows the records, and nobody else is answered."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import urllib.error
import urllib.request

import pytest
from helpers import free_ports, start
from sweeps import leave_record, seed_trials, sweep_of

from lora_vit.errors import ConfigError
from lora_vit.sweep import __main__ as command
from lora_vit.sweep import worker
from lora_vit.sweep.serve import newest


def ask(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return answer.read().decode()


def line_of(page: str) -> str:
    """The page's own line, without the time of day."""
    return re.sub(r"\d\d:\d\d:\d\d", "TIME", re.findall('id="live".*?>(.*?)</p>', page)[0])


@pytest.mark.slow
def test_the_page_follows_a_real_sweep(tmp_path):
    sweep = sweep_of(tmp_path / "s", [*seed_trials(1), *seed_trials(1, optimizer__lr=0.03)])
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}/"
    server = start([sys.executable, "-m", "lora_vit.sweep", str(sweep.folder), "--serve", str(port)], tmp_path)
    try:
        assert server.stdout.readline() == f"{url} shows s until Ctrl-C\n"
        before = ask(url)
        assert (line_of(before), before.count(">waiting<")) == ("0 of 2 trials; refreshed TIME", 2)
        worker.work(sweep.folder)
        there = sorted(str(path) for path in sweep.folder.rglob("*"))
        after = ask(f"http://localhost:{port}/")
        for path, host, code in (("", "evil.example", 403), ("s/sweep.json", "localhost", 404)):
            with pytest.raises(urllib.error.HTTPError, match=str(code)):
                ask(url + path, Host=host)
        server.send_signal(signal.SIGINT)
        out = server.communicate(timeout=30)[0]
    finally:
        server.kill()
    assert (server.returncode, out) == (130, "interrupted\n")
    assert line_of(after) == "All 2 trials have ended; read at TIME"
    assert [re.findall('data-ended="(.*?)"', page) for page in (before, after)] == [["False"], ["True"]]
    accuracies = [sweep.state_of(trial).record.metrics["val_accuracy"] for trial in sweep.trials.values()]
    assert f"{100 * max(accuracies):.2f} %" in after
    assert (before.count("<svg"), after.count("<svg")) == (0, 2)
    assert sorted(str(path) for path in sweep.folder.rglob("*")) == there, "nothing is written"


def complete(sweep, trial, value=0.5, **fields):
    data = {"fingerprint": "f", "val": 100, "train": 300, "test": 100, "classes": 10, **fields}
    leave_record(sweep, trial, "completed", metrics={"val_accuracy": value, "epoch": 2}, data=data)


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_vit.analysis.plots.draw_all", lambda summary: {})
    return sweep_of(tmp_path / "s", seed_trials(3))


def test_trials_that_cannot_be_compared_are_listed_with_why(sweep):
    first, second, third = sweep.trials.values()
    complete(sweep, first)
    leave_record(sweep, second, "failed", error={"message": "no <memory>"})
    assert line_of(made := newest(sweep)) == "2 of 3 trials; refreshed TIME"
    assert "50.00 %" in made
    assert newest(sweep) is made, "nothing has changed"
    complete(sweep, third, 0.6, fingerprint="g")  # must not be compared
    assert "fingerprint" in line_of(kept := newest(sweep))
    assert line_of(kept).startswith("All 3 trials have ended; read at TIME; not compared: error: ")
    assert re.findall(r">(\d+\.\d+)%<", kept) == ["60.00", "50.00"]
    complete(sweep, third, 0.6)
    assert "55.00 %" in newest(sweep), "the mean of two seeds"
    (sweep.folder_of(third) / "record.json").write_text("{")
    assert "record.json is not complete JSON" in newest(sweep)


def test_failed_trials_alone_are_listed_with_why(sweep):
    for trial in sweep.trials.values():
        leave_record(sweep, trial, "failed", error={"message": "no <memory>"})
    assert newest(sweep).count("no &lt;memory&gt;") == 4, "in each row, and in the line"


def test_a_search_and_a_race_end_with_what_they_want(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_vit.analysis.plots.draw_all", lambda summary: {})
    trials = seed_trials(2)
    race = {"margin": 1.0, "first_seeds": 3, "most_seeds": 6, "seed": 0, "cells": [trials[0].cell_id]}
    for name, plan, line in (("a", {"search": {"trials": 5}}, "2 of 5 trials"), ("b", {"race": race}, "2 of 2 trials")):
        sweep = sweep_of(tmp_path / name, trials)
        with sweep.changing() as planned:
            planned.update(plan)
        for trial in trials:
            complete(sweep, trial)
        assert line_of(newest(sweep)) == f"{line}; refreshed TIME"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["s", "--serve", "99999"], "^--serve 99999: .*: give another one, or none$"),
        (["work", "s", "--serve"], "^work s: give one sweep \\(--serve goes with it alone\\), or `work FOLDER`$"),
        (["other", "--serve"], "^other is neither a sweep"),
    ],
)
def test_wrong_uses_say_what_to_give(given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sweep_of(tmp_path / "s", seed_trials(1))
    command.add_arguments(parser := argparse.ArgumentParser())
    with pytest.raises(ConfigError, match=said):
        command.run(parser.parse_args(given))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_shown(sweep):
    sweep.folder.chmod(0o500)
    assert "0 of 3 trials" in newest(sweep)
