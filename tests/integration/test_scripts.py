"""Nothing imports the scripts: each runs here on something small."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from pictures import paint
from safetensors.numpy import load_file

SCRIPTS = Path(__file__).parents[2] / "scripts"
SUMMARY = SCRIPTS / "bench" / "summary.py"
RACE = SCRIPTS / "bench" / "race.py"
CALIBRATE = SCRIPTS / "calibrate_statistics.py"


@pytest.mark.slow
def test_a_backbone_is_pretrained(tmp_path):
    (empty := tmp_path / "empty").mkdir()
    few = ("--steps", "2", "--classes", "3", "--batch-size", "4", "--threads", "1")
    assert "step 2/2" in run(SCRIPTS / "pretrain_backbone.py", empty, "--out", str(tmp_path / "b.safetensors"), *few)
    ours = load_file(SCRIPTS.parent / "lora_vit" / "models" / "vit_tiny.safetensors")
    assert load_file(tmp_path / "b.safetensors").keys() == ours.keys()


def test_the_page_of_settings_is_what_the_schema_and_conf_say():
    """`python scripts/settings_reference.py` writes it again."""
    script = runpy.run_path(str(SCRIPTS / "settings_reference.py"))
    assert script["PAGE"].read_text() == script["page"]()


@pytest.mark.slow
def test_bugs_are_planted(tmp_path):
    pytest.importorskip("mutmut")
    module, tests = SCRIPTS.parent / "lora_vit/randomness.py", SCRIPTS.parent / "tests/unit/test_randomness.py"
    out = run(SCRIPTS / "mutation.py", tmp_path, str(module), "--tests", str(tests), "--sample", "2")
    assert "| `randomness.py` | " in out


@pytest.mark.slow
def test_the_time_of_a_summary_is_measured(tmp_path):
    """It makes records that are believed."""
    *_, row = run(SUMMARY, tmp_path, "--records", "7").splitlines()
    assert row.startswith("| 7 | 3 | ")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "rows"), [("marks", 54 + 18), ("race", 58 + 4), ("margin", 15)])
def test_the_reports_claims_are_calibrated(tmp_path, mode, rows):
    """One simulated sweep for each line of the tables in docs/statistics.md."""
    lines = run(CALIBRATE, tmp_path, mode, "--runs", "1").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    heads = 2 * sum(line.startswith("|---") for line in tables)
    assert len(tables) - heads == rows
    assert "nan" not in " ".join(tables)


@pytest.mark.slow
def test_claims_about_other_pictures_are_calibrated(tmp_path):
    """Four sweeps for each line of docs/data/pictures.csv."""
    rows = [line for line in run(CALIBRATE, tmp_path, "pictures", "--runs", "4").splitlines() if line.count(",") > 9]
    assert len(rows) == 1 + 72 + 6 + 6 + 12


@pytest.mark.slow
def test_the_race_is_compared_with_its_peers(tmp_path):
    out = run(RACE, tmp_path, "peers", "--runs", "1")
    for means, sd in (("one ahead by 0.5", 0.3), ("spread, sd 0.6", 0.3), ("one ahead by 0.5", 0.6)):
        for way in ("race, 3 first", "race, 5 first", "WilcoxonPruner, 5", "WilcoxonPruner, 10"):
            assert f"| {means} | {sd} | {way} seeds | " in out


@pytest.mark.slow
def test_a_race_on_digits_is_compared_with_one_stage(tmp_path):
    """Of two ranks, one epoch each; so wide a margin takes one seed in a single stage."""
    (empty := tmp_path / "empty").mkdir()
    small = ["lora=default", "lora.rank=1,2", "optimizer.lr=1e-3", "trainer.epochs=1", "sweep.pack_size=2"]
    truth = tmp_path / "truth.csv"
    run(RACE, empty, "truth", "--truth", str(truth), "--runs", "2", *small)
    names = pd.read_csv(truth)["label"].tolist()
    assert sorted(names) == ["rank 1, alpha 4", "rank 2, alpha 8"]
    out = run(RACE, empty, "digits", "--truth", str(truth), *small, "sweep.margin=40", "sweep.first_seeds=2")
    race, stage = ([cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()[-2:])
    assert race[:2] == ["race", "4"]
    assert stage[:2] == ["one stage, 1 seeds", "2"]
    assert {race[3], stage[3]} <= set(names)


def run(path: Path, cwd: Path, *arguments: str) -> str:
    done = subprocess.run([sys.executable, path, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert not list(cwd.iterdir())
    return done.stdout


@pytest.mark.slow
def test_data_is_prepared_for_training(tmp_path):
    (empty := tmp_path / "empty").mkdir()
    for name in ("cat", "dog"):
        for i in range(10):
            paint(tmp_path / "pets" / name / f"{i}.png", i)
    places = ("imagefolder", "--root", str(tmp_path / "pets"), "--cache-dir", str(tmp_path / "cache"))
    told = run(SCRIPTS / "prepare_data.py", empty, *places, "--cache-size", "16")
    sizes = "".join(f"  {part}  {n:15}\n" for part, n in (("train", 16), ("val  ", 2)))
    assert f"imagefolder: 20 images of 16x16 pixels in 2 classes\n{sizes}" in told
    assert "imagefolder: 20 images of 256x256 pixels" in run(SCRIPTS / "prepare_data.py", empty, *places)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 2


@pytest.mark.slow
def test_the_data_path_is_measured(tmp_path):
    (empty := tmp_path / "empty").mkdir()
    folder, out = tmp_path / "data" / "tiny-imagenet-200", tmp_path / "out.json"
    for wnid in ("n1", "n2"):
        for i in range(80):
            paint(folder / "train" / wnid / "images" / f"{i}.JPEG", i, (64, 64))
    (folder / "wnids.txt").write_text("n1\nn2\n")
    few = ("--rounds", "1", "--batches", "1", "--json", str(out))
    run(SCRIPTS / "bench/data.py", empty, str(tmp_path / "data"), *few)
    measured = json.loads(out.read_text())
    assert measured["facts"]["images"] == 160
    assert len(measured["rows"]) == 8
    assert all(row["max images/s"] > 0 for row in measured["rows"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        (("bench/sweep.py", "compose", "--sizes", "3"), ["| 3 | "]),
        (("bench/sweep.py", "curve", "--rounds", "1", "--sizes", "1,2", "--only", "vit_tiny"), ["| vit_tiny"] * 2),
        (("bench/sweep.py", "ways", "--only", "packed", "trainer.epochs=1", "seed=0", "lora=default",
          "optimizer.lr=1e-3"),
         ["| packed |", "| packed, one process"]),
        (("bench/start.py", "--rounds", "1"), ["| --help |", "| first step |", "| - data and weights |"]),
        (("bench/step.py", "--rounds", "1", "--batch", "1", "--only", "plain LoRA modules", "ours, K = 4, recomputed"),
         ["| floor |", "| ours |", "| plain LoRA modules |"]),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_times_are_measured(arguments, rows, tmp_path):
    """Each script's way through, as small as it goes."""
    out = run(SCRIPTS / arguments[0], tmp_path, *arguments[1:])
    for row in rows:
        assert out.count(row) == rows.count(row), out
