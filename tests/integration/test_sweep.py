"""Sweeps as commands: what is packed equals what runs alone, and nothing is lost or trained twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import helpers
import numpy as np
import pytest
import sabotages
from helpers import command, contents, is_running, rows_of, run_command, start, trial_config, wait_until
from safetensors.numpy import load_file

from lora_vit import api
from lora_vit.config import trial_id
from lora_vit.files import read_rows
from lora_vit.records import PREDICTIONS, TrialRecord, read_record
from lora_vit.sweep import worker

pytestmark = pytest.mark.slow

TOLERANCE = 1e-9
"""fp64: a pack's matrix products add in another order than those of a trial alone."""
DIFFERENT = (
    ("seed=0", "lora.rank=1", "lora.alpha=4", "lora.dropout=0.0", "optimizer.lr=1e-2", "optimizer.weight_decay=0.0"),
    ("seed=0", "lora.rank=8", "lora.alpha=32", "lora.dropout=0.3", "optimizer.lr=1e-3", "optimizer.betas=[0.8,0.99]"),
    ("seed=1", "lora.scaling=rslora", "optimizer.schedule=cosine", "optimizer.clip_norm=0.1"),
    ("seed=2", "model.head_dropout=0.5", "optimizer.warmup=0.3", "optimizer.label_smoothing=0.2", "optimizer.eps=1e-6"),
)
"""Trials that differ in everything that trials of one pack may differ in."""
COMMON = ("data.augment=crop_flip", "trainer.checkpoint_every=0.02", "trainer.epochs=12")


def sweep_of_different(folder: Path) -> list[str]:
    """The command that trains DIFFERENT, which is no grid, in one pack: each is an experiment file of the user's."""
    experiments = folder / "own" / "experiment"
    experiments.mkdir(parents=True)
    for i, trial in enumerate(DIFFERENT):
        sections: dict[str, list[str]] = {}
        for line in trial:
            key, value = line.split("=", 1)
            section, _, name = key.rpartition(".")
            sections.setdefault(section, []).append(f"{name}: {value}")
        text = "# @package _global_\n" + "\n".join(sections.pop("", [])) + "\n"
        for section, lines in sections.items():
            text += f"{section}:\n" + "".join(f"  {line}\n" for line in lines)
        (experiments / f"t{i}.yaml").write_text(text)
    return command("-m", "--config-dir=own", *COMMON, "experiment=t0,t1,t2,t3", "sweep.name=lists", "sweep.pack_size=4")


def run(line: list[str], cwd: Path, code: int = 0) -> str:
    done = helpers.run(line, cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def records_of(sweep: Path) -> dict[str, TrialRecord]:
    return {p.parent.name: read_record(p.parent) for p in sorted(sweep.glob("*/record.json"))}


def wait_for_rows(process: subprocess.Popen[str], sweep: Path, rows: int) -> None:
    """Until all trials of the sweep together have logged that many rows."""
    wait_until(lambda: rows_of(*sweep.glob("*/metrics.jsonl")) >= rows, process, every=0.002)


def owners(sweep: Path) -> set[int]:
    """The processes that have or had claims."""
    return {json.loads(path.read_text())["pid"] for path in (sweep / ".claims").glob("*.owner")}


def kill_all(process: subprocess.Popen[str], sweep: Path) -> None:
    """At once: the workers of a killed command alone would notice within a second, and could be done by then."""
    for pid in owners(sweep):
        if pid != process.pid and is_running(pid):
            os.kill(pid, signal.SIGKILL)
    process.kill()
    process.communicate()


def assert_equal_trials(a: Path, b: Path) -> None:
    """Losses and adapters within the tolerance, predictions identical."""
    rows, others = read_rows(a / "metrics.jsonl"), read_rows(b / "metrics.jsonl")
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others, strict=True):
        assert row["kind"] == other["kind"]
        for key in row.keys() - {"kind"}:
            assert row[key] == pytest.approx(other[key], rel=TOLERANCE), (key, row, other)
    files, other_files = (load_file(p / "adapter.safetensors") for p in (a, b))
    assert files.keys() == other_files.keys()
    for name, values in files.items():
        # stored in fp32; a key's bias has no gradient but for rounding, which Adam takes to 1e-12 with other threads
        np.testing.assert_allclose(values, other_files[name], rtol=1e-6, atol=1e-10, err_msg=name)
    predictions, other_predictions = np.load(a / PREDICTIONS), np.load(b / PREDICTIONS)
    for name in ("val.predicted", "test.predicted"):
        np.testing.assert_array_equal(predictions[name], other_predictions[name])


def assert_equal_sweeps(a: Path, b: Path) -> None:
    for name in records_of(b):
        assert_equal_trials(a / name, b / name)


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The sweep of different trials in one pack, uninterrupted."""
    folder = tmp_path_factory.mktemp("packed")
    run(sweep_of_different(folder), folder)
    sweep = folder / "outputs/sweeps/lists"
    assert {r.cost["pack_size"] for r in records_of(sweep).values()} == {4}
    return sweep


def test_what_one_sees_of_a_sweep(packed, call, monkeypatch):
    """One folder of event files, and the status command: a row is a line."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(packed.parents[2])
    runs = sorted((packed / "tensorboard").iterdir())
    assert [p.name.rpartition("_")[0] for p in runs] == [f"experiment=t{i}" for i in range(4)]
    events = EventAccumulator(str(runs[0])).Reload()
    assert {"train/loss", "train/learning_rate", "val/accuracy", "final/val_accuracy"} <= set(events.Tags()["scalars"])
    assert "_hparams_/session_start_info" in events.summary_metadata
    code, out, _ = call("sweep", "lists")
    assert (code, len(out.splitlines())) == (0, 1 + 4 + 1)
    for words in ("experiment=t3", "12/12", "4 trials (4 completed)"):
        assert words in out
    assert call("sweep", "outputs/sweeps/lists") == (0, out, "")
    code, _, err = call("sweep", "gone")
    assert code == 1
    assert "neither a sweep in outputs/sweeps/ nor" in err
    assert "(one of: lists)" in err


def test_a_trial_in_a_pack_equals_the_trial_alone(packed, tmp_path):
    for trial in DIFFERENT:
        config = trial_config(*COMMON, *trial)
        assert api.train(config, tmp_path / trial_id(config)).cost["pack_size"] == 1
    assert_equal_sweeps(tmp_path, packed)


@pytest.mark.parametrize("sabotage", sabotages.SABOTAGES)
def test_a_broken_trial_axis_is_noticed(sabotage, packed, tmp_path, monkeypatch):
    (sweep := tmp_path / "s").mkdir()
    shutil.copy(packed / "sweep.json", sweep)
    sabotages.SABOTAGES[sabotage](monkeypatch)
    worker.work(sweep)
    assert records_of(sweep).keys() == records_of(packed).keys()
    with pytest.raises(AssertionError, match=r"loss|lora_|heads"):
        assert_equal_sweeps(sweep, packed)


def test_single_precision_differs_by_rounding_alone(tmp_path, project_root):
    """On real images and weights: the first loss, and who is classified otherwise (see the script)."""
    arguments = ("-m", "experiment=quickstart", "trainer.epochs=2", "lora.rank=2,8", "lora.dropout=0.2")
    own = ("sweep.name=s", "sweep.pack_size=2", "trainer.accelerator=cpu")
    run([sys.executable, "-m", "lora_vit.train", *arguments, *own], tmp_path)
    sweep = tmp_path / "outputs/sweeps/s"
    records = records_of(sweep)
    assert [r.cost["pack_size"] for r in records.values()] == [2, 2]
    script = [sys.executable, str(project_root / "scripts/pack_equals_alone.py"), "outputs/sweeps/s", "--trials", "1"]
    out = run(script, tmp_path)
    assert out.count("within") == 1, out
    first = sweep / next(iter(records))
    arrays = dict(np.load(first / PREDICTIONS))  # one prediction that was not close
    sure = arrays["val.true_probability"].argmax()
    arrays["val.predicted"][sure] = (arrays["val.predicted"][sure] + 1) % 10
    np.savez(first / PREDICTIONS, **arrays)
    assert "TOO FAR" in run(script, tmp_path, code=1)


def test_killed_and_finished_by_the_same_command(packed, tmp_path):
    line = sweep_of_different(tmp_path)
    sweep = tmp_path / "outputs/sweeps/lists"
    for rows in (2, 40):
        process = start(line, tmp_path)
        wait_for_rows(process, sweep, rows)
        kill_all(process, sweep)
    assert any(r.status == "running" for r in records_of(sweep).values())
    out = run(line, tmp_path)
    assert "[4/4]" in out
    assert_equal_sweeps(sweep, packed)  # a kill between two checkpoints leaves trials that meet in other packs


def test_stopped_and_finished_in_the_same_pack_is_bit_identical(packed, tmp_path):
    line = sweep_of_different(tmp_path)
    sweep = tmp_path / "outputs/sweeps/lists"
    process = start(line, tmp_path)
    wait_for_rows(process, sweep, 40)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143, out
    assert out.endswith("interrupted by SIGTERM: saved; the same command resumes\n")
    run(line, tmp_path)
    for name in records_of(packed):
        assert contents(sweep / name) == contents(packed / name)


def test_trials_in_different_epochs_train_in_one_pack(packed, tmp_path):
    """Killed when two trials have an epoch behind them and the others none, then finished in a pack of four."""
    sweep = tmp_path / "outputs/sweeps/lists"
    line = [*sweep_of_different(tmp_path)[:-1], "trainer.checkpoint_every=300"]
    process = start([*line, "sweep.pack_size=2"], tmp_path)
    wait_for_rows(process, sweep, 20)  # two trials in their second epoch
    kill_all(process, sweep)
    begun = records_of(sweep)
    assert [r.metrics["epoch"] for r in begun.values()] == [1, 1]
    run([*line, "sweep.pack_size=4"], tmp_path)
    for name, record in records_of(sweep).items():
        assert record.cost["pack_size"] == (4 if name in begun else 2)
        assert_equal_trials(sweep / name, packed / name)


def test_a_diverging_trial_is_cut_out(tmp_path):
    rates = "optimizer.lr=1e-3,1e300,1e-2"
    done = run_command("-m", rates, "sweep.pack_size=3", "sweep.name=bad", cwd=tmp_path, code=1)
    sweep = tmp_path / "outputs/sweeps/bad"
    (failed,) = (r for r in records_of(sweep).values() if r.status == "failed")
    assert failed.config["optimizer"]["lr"] == 1e300
    assert failed.error is not None
    assert failed.error["step"] is not None
    assert "not finite at step" in done.stdout
    assert done.stderr.startswith("error: 1 of 3 trials did not complete; sweep.retry_failed=true")
    assert not (sweep / failed.trial_id / "adapter.safetensors").exists()


def test_a_grown_grid_keeps_name_and_pack_size_and_trains_what_is_new(tmp_path):
    own = ("-m", "sweep.pack_size=auto", "sweep.workers=1", "trainer.epochs=1")
    assert "[4/4]" in run_command(*own, "lora.rank=range(1,5)", cwd=tmp_path).stdout
    (sweep,) = (tmp_path / "outputs/sweeps").iterdir()
    sizes = json.loads((sweep / "sweep.json").read_text())["pack_sizes"]
    (figures,) = sizes.values()
    assert figures["size"] in (1, 2, 4)
    assert {"1", "2"} <= set(figures["seconds_per_trial_epoch"]) <= {"1", "2", "4"}
    before = {i: (r.finished, contents(sweep / i)) for i, r in records_of(sweep).items()}
    grown = run_command(*own, "lora.rank=range(1,6)", cwd=tmp_path).stdout
    assert "5 trials (4 completed)" in grown
    assert [p.name for p in (tmp_path / "outputs/sweeps").iterdir()] == [sweep.name]
    assert json.loads((sweep / "sweep.json").read_text())["pack_sizes"] in (sizes, {}), "measured once"
    after = {i: (r.finished, contents(sweep / i)) for i, r in records_of(sweep).items()}
    assert len(after) == 5
    assert {i: after[i] for i in before} == before


def test_two_commands_share_a_sweep(tmp_path):
    """Two processes, one of them killed on the way: each trial is trained, none by both."""
    line = command(
        "-m", "lora.rank=1,2,4", "seed=0,1,2,3", "trainer.epochs=4", "sweep.pack_size=2", "sweep.name=shared"
    )
    sweep = tmp_path / "outputs/sweeps/shared"
    killed = start(line, tmp_path)
    wait_for_rows(killed, sweep, 10)
    others = [start(line, tmp_path) for _ in range(2)]
    wait_for_rows(others[0], sweep, 80)
    killed.kill()
    killed.communicate()
    outs = []
    for process in others:
        outs.append(process.communicate(timeout=120)[0])
        assert process.returncode == 0, outs[-1]
    records = records_of(sweep)
    assert len(records) == 12
    assert {r.status for r in records.values()} == {"completed"}
    for name in records:  # one "completed" line each: none was trained to its end twice
        assert (sweep / name / "train.log").read_text().count("completed") == 1
    for out in outs:
        assert "[12/12]" in out


def test_two_workers_give_the_same_bits_again(tmp_path):
    """Also of full fine-tuning, which has packs of its own and leaves the others' backbone alone, and of probes."""
    sweeps = [tmp_path / f"outputs/sweeps/{name}" for name in ("first", "second")]
    cache = f"data.cache_dir={tmp_path}/cache"  # of the features, which all probes share
    own = ("lora=default,none,full", "lora.rank=1,2", "seed=0,1", "sweep.workers=2", "sweep.pack_size=2", cache)
    for sweep in sweeps:
        assert "[8/8]" in run_command("-m", *own, f"sweep.name={sweep.name}", cwd=tmp_path).stdout
    records = records_of(sweeps[0]).values()
    sizes = {(r.config["lora"]["method"], r.cost["pack_size"]) for r in records}
    assert sizes == {("lora", 2), ("none", 2), ("full", 1)}
    assert {r.config["lora"]["method"] for r in records if "features_seconds" in r.cost} == {"none"}
    for record in records:
        assert contents(sweeps[0] / record.trial_id) == contents(sweeps[1] / record.trial_id)
    for trial in (("lora=none", "seed=0"), ("lora=full", "seed=1")):
        record = api.train(trial_config(*trial, cache), tmp_path / trial[0])
        assert_equal_trials(sweeps[0] / record.trial_id, tmp_path / trial[0])


def test_a_killed_command_takes_its_workers_along(tmp_path):
    line = command("-m", "seed=0,1,2,3", "trainer.epochs=400", "sweep.name=s", "sweep.workers=2", "sweep.pack_size=2")
    sweep = tmp_path / "outputs/sweeps/s"
    process = start(line, tmp_path)
    wait_for_rows(process, sweep, 40)
    wait_until(lambda: len(owners(sweep)) >= 2, process)
    workers = owners(sweep)
    process.kill()
    process.wait()
    until = time.monotonic() + 30
    while any(map(is_running, workers)):
        assert time.monotonic() < until
        time.sleep(0.1)
    process.stdout.close()
    assert {r.status for r in records_of(sweep).values()} != {"completed"}


def test_a_dry_run_needs_neither_weights_nor_data_and_writes_nothing(tmp_path):
    """The headline task: no download, no step of the large model."""
    overrides = ("lora.rank=2,4", "sweep.dry_run=true", "data.root=nowhere", "data.cache_dir=cache")
    out = run([sys.executable, "-m", "lora_vit.train", "-m", *overrides, "trainer.accelerator=cpu"], tmp_path)
    for words in ("vit_b_16 224 px, tiny_imagenet", "2 trials, 0 of them finished", "measured at the start",
                  "data=tiny_imagenet has not been read yet"):  # fmt: skip
        assert words in out
    assert list(tmp_path.iterdir()) == []
