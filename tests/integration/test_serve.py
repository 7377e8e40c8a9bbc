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
from lora_vit.sweep.serve import Pages


def ask(url: str, **headers: str) -> str:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
        return answer.read().decode()


def line_of(page: str) -> str:
    """The page's own line, without the time of day."""
    return re.sub(r"\d\d:\d\d:\d\d", "TIME", re.findall('id="live".*?>(.*?)</p>', page)[0])


@pytest.mark.slow
def test_the_page_follows_a_real_sweep(tmp_path):
    sweep = sweep_of(tmp_path / "s", seed_trials(2))
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
    assert f"{50 * sum(accuracies):.2f} %" in after
    assert (before.count("<svg"), after.count("<svg")) == (0, 2)
    assert sorted(str(path) for path in sweep.folder.rglob("*")) == there, "nothing is written"


def complete(sweep, trial, value=0.5, **fields):
    config = {"metrics": {"val_accuracy": value, "epoch": 2}, "data": {"fingerprint": "f", "val": 100}}
    leave_record(sweep, trial, "completed", **{**config, **fields})


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setattr("lora_vit.sweep.serve.REST", 0)  # no wait
    monkeypatch.setattr("lora_vit.analysis.plots.draw_all", lambda summary: {})
    return Pages(sweep_of(tmp_path / "s", seed_trials(3)).folder)


def test_trials_that_cannot_be_compared_are_listed_with_why(page):
    first, second, third = page.sweep.trials.values()
    complete(page.sweep, first)
    leave_record(page.sweep, second, "failed", error={"message": "no <memory>"})
    assert line_of(made := page.newest()) == "2 of 3 trials; refreshed TIME"
    assert "50.00 %" in made
    assert page.newest() is made, "nothing has changed"
    complete(page.sweep, third, 0.6, data={"fingerprint": "g", "val": 100})  # must not be compared
    assert "fingerprint" in line_of(kept := page.newest())
    assert line_of(kept).startswith("All 3 trials have ended; read at TIME; not compared: error: ")
    assert re.findall(r">(\d+\.\d+)%<", kept) == ["60.00", "50.00"]
    complete(page.sweep, third, 0.6)
    assert "55.00 %" in page.newest(), "the mean of two seeds"
    (page.sweep.folder_of(third) / "record.json").write_text("{")
    assert "record.json is not complete JSON" in page.newest()


def test_failed_trials_alone_are_listed_with_why(page):
    for trial in page.sweep.trials.values():
        leave_record(page.sweep, trial, "failed", error={"message": "no <memory>"})
    assert page.newest().count("no &lt;memory&gt;") == 4, "in each row, and in the line"


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
        assert line_of(Pages(sweep.folder).newest()) == f"{line}; refreshed TIME"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["s", "--serve", "99999"], "^--serve 99999: .*: give another one, or none$"),
        (["work", "s", "--serve"], "^work s --serve: give --serve with a sweep's name alone$"),
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
def test_a_folder_that_cannot_be_written_is_shown(page):
    page.sweep.folder.chmod(0o500)
    assert "0 of 3 trials" in page.newest()
