"""Which pictures are wrong: of a trial's own parts and of others, in figures, files and a page."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import train_together, trial_config
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_score, recall_score

from lora_vit import api, evaluate
from lora_vit.records import PREDICTIONS, read_record

CLASSES = ["class 0", "class 1", "class 2", "class 3"]  # those of data=fake, too


def save_images(place: Path, classes: list[str], count: int, seed: int) -> None:
    """Pictures that are hard to tell apart: noise around a grey that says the class."""
    rng = np.random.default_rng(seed)
    for i, name in enumerate(classes):
        (place / name).mkdir(parents=True)
        for n in range(count):
            pixels = rng.integers(0, 200, (16, 24, 3)) + 6 * i
            Image.fromarray(pixels.astype(np.uint8)).save(place / name / f"{n:02}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A sweep ``trials/`` of two on ``images/`` (``0`` and ``1``), and ``fake/0``, on made-up ones."""
    place = tmp_path_factory.mktemp("place")
    save_images(place / "images", CLASSES, 20, seed=0)
    (place / "trials").mkdir()
    (place / "trials/sweep.json").write_text('{"trials": {}}')
    own = ("data=imagefolder", f"data.root={place}/images", f"data.cache_dir={place}/cache", "trainer.precision=fp32")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_vit.data.files._UNSETTLED", 0)  # else files of this second are read again
        train_together([trial_config(*own, f"seed={seed}") for seed in (0, 1)], place / "trials")
    train_together([trial_config(f"data.cache_dir={place}/cache", "trainer.precision=fp32")], place / "fake")
    return place


@pytest.fixture
def other(place, tmp_path, monkeypatch) -> Path:
    """Pictures of two of the classes, one of them of the trial's training images, and a table of the rest."""
    monkeypatch.chdir(tmp_path)
    save_images(tmp_path / "other", CLASSES[1:3], 15, seed=1)
    part_of = api.evaluate(place / "trials/0", "train")[0].pictures()
    known = next(path for path in part_of["path"] if "class 1" in path)
    (tmp_path / "other/class 1/again.png").write_bytes(Path(known).read_bytes())
    (tmp_path / "other/class 2/notes.txt").write_text("no image")
    rows = [(path.relative_to(tmp_path / "other"), path.parent.name) for path in tmp_path.glob("other/*/*.png")]
    pd.DataFrame(rows, columns=["image", "label"]).to_csv("table.csv", index=False)
    return tmp_path / "other"


def shares(labels: pd.Series, predicted: pd.Series) -> tuple[float, float, float]:
    right = int((labels == predicted).sum())
    ends = binomtest(right, len(labels)).proportion_ci(method="wilson")
    return right / len(labels), ends.low, ends.high


def odd_table(other: Path) -> None:
    """``odd.csv``, of whose columns no name says what it holds."""
    table = pd.read_csv(other.parent / "table.csv")
    table.set_axis(["this", "that"], axis="columns").assign(more=1).to_csv(other.parent / "odd.csv", index=False)


ODD = ["--labels", "odd.csv", "--columns", "this", "that", "--data-root", "other"]


@pytest.mark.parametrize("given", [["--data-root", "other"], ["--labels", "table.csv", "--data-root", "other"], ODD])
@pytest.mark.parametrize("trial", ["trials/0", "fake/0"])
def test_other_pictures_of_some_classes(given, trial, place, other, call):
    """Each is what predict says of it; the figures are scikit-learn's and scipy's."""
    odd_table(other)
    code, said, _ = call("evaluate", place / trial, *given, "--csv", "p.csv", "--out", "out")
    rows = pd.read_csv("p.csv")
    predict, _ = api.predict(place / trial, sorted(other.glob("*/*.png")), top=1)
    found = pd.DataFrame(predict).set_index(0).loc[[str(Path(path).absolute()) for path in rows["path"]]]
    assert (len(rows), rows["predicted"].tolist()) == (len(predict), found[2].tolist())
    np.testing.assert_allclose(rows["probability"], found[3], rtol=1e-3)
    assert rows["true"].tolist() == [Path(path).parent.name for path in rows["path"]]
    assert {*rows["part"]} == {"external"}
    right = (rows["true"] == rows["predicted"]).to_numpy()
    sureness = np.where(right, rows["probability"], -rows["probability"])
    assert 0 < right.sum() < len(right)
    assert (np.diff(sureness) >= 0).all()

    share, low, high = shares(rows["true"], rows["predicted"])
    assert code == 0
    assert f"External Accuracy: {share:.2%}  (31 images), 95 % interval {low:.2%} to {high:.2%}\n" in said
    classes = pd.read_csv("out/classes.csv").set_index("class")
    seen = "on 1 of them" if trial == "trials/0" else "is not known"
    for words in ("31 images that are not the trial's own", "of 2 of its 4 classes (none of class 0, class 3)", seen):
        assert words in said
    assert "1 no images (class 2/notes.txt)" in said

    every = {"labels": CLASSES, "average": None, "zero_division": np.nan}
    recalls = pd.Series(recall_score(rows["true"], rows["predicted"], **every), CLASSES).dropna()
    precisions = pd.Series(precision_score(rows["true"], rows["predicted"], **every), CLASSES)
    assert f"External Balanced Accuracy: {recalls.mean():.2%}" in said
    assert classes["recall"].to_dict() == pytest.approx(recalls.to_dict())
    assert classes["precision"].to_numpy() == pytest.approx(precisions[classes.index].to_numpy(), nan_ok=True)
    assert classes["recall"].is_monotonic_increasing
    for name, row in classes.iterrows():
        of = rows[rows["true"] == name]
        assert row["images"] == len(of)
        assert (row["low"], row["high"]) == pytest.approx(shares(of["true"], of["predicted"])[1:])
    matrix = pd.read_csv("out/confusion.csv", index_col=0)
    np.testing.assert_array_equal(matrix, confusion_matrix(rows["true"], rows["predicted"], labels=CLASSES))
    assert Path("out/confusion.png").read_bytes().startswith(b"\x89PNG")
    page = Path("out/errors.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,(.*?)" alt="(.*?)"', page)
    assert [path for _, path in pictures] == rows["path"][~right].tolist()
    shown = Image.open(io.BytesIO(base64.b64decode(pictures[0][0])))
    assert shown.tobytes() == Image.open(pictures[0][1]).tobytes(), "the whole picture, not the square that is cropped"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--data-root", "wasps"], "it has 'wasp' in addition"),
        (["--data-root", "other", "--split", "test"], "--split test is of the trial's own data, which these are not"),
        (["--data-root", "deep"], "more than 8 bits"),
        (["--data-root", "absent"], "--data-root=absent is not a folder"),
        (["--data-root", "absent", "--split", "val"], "--data-root=absent is not a folder"),
        (["--labels", "absent.csv"], "--labels=absent.csv cannot be read"),
        (["--labels", "odd.csv", "--data-root", "other"], "--columns has no value: give the one of this, that, more"),
        (["--labels", "odd.csv", "--columns", "this", "thta"], "--columns=thta is not there, did you mean 'that'?"),
        (["--columns", "this", "that"], "--columns this that: give the table with --labels"),
        (["--out", "table.csv"], "table.csv cannot be written (File exists): give another folder with --out"),
        (["--csv", "other/x.png"], "--csv other/x.png: give a file name that ends in .csv"),
    ],
)
def test_what_cannot_be_evaluated(given, words, place, other, call):
    save_images(Path("wasps"), ["class 1", "wasp"], 1, seed=2)
    for name in ("class 1", "class 2"):
        Path("deep", name).mkdir(parents=True)
        Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 100).save(Path("deep", name, "0.png"))
    odd_table(other)
    code, said, error = call("evaluate", place / "trials/0", *given)
    assert words in error
    assert (code, "Accuracy" in said, error.count("\n")) == (1, False, 1)


def test_a_trials_own_pictures_need_no_pass(place, tmp_path, call, monkeypatch):
    """What the record holds of them is what a pass gives; where it holds too little, there is a pass."""
    from lora_vit import trained

    trial, passes, run = place / "trials/0", [], trained.trained_pack
    monkeypatch.setattr(trained, "trained_pack", lambda *given, **more: passes.append(1) or run(*given, **more))
    monkeypatch.chdir(tmp_path)
    for split, count in (("val", 0), ("train", 1)):
        assert call("evaluate", trial, "--split", split, "--csv", f"{split}.csv")[0] == 0
        assert len(passes) == count
        whole, _ = api.evaluate(trial, split)
        assert (len(passes), whole.part) == (count + 1, split)
        passes.clear()
        rows = pd.read_csv(f"{split}.csv")
        pd.testing.assert_frame_equal(rows, whole.pictures().reset_index(drop=True), check_dtype=False)
        assert rows["true"].tolist() == [Path(path).parent.name for path in rows["path"]]
        assert all(Path(path).is_file() for path in rows["path"])
    with np.load(trial / PREDICTIONS) as arrays:
        older = {name: array for name, array in arrays.items() if name != "val.brier"}
    kept = (trial / PREDICTIONS).read_bytes()
    np.savez(trial / PREDICTIONS, **older)
    assert (call("evaluate", trial, "--split", "val", "--csv", "again.csv")[0], len(passes)) == (0, 1)
    assert Path("again.csv").read_bytes() == Path("val.csv").read_bytes()
    (trial / PREDICTIONS).write_bytes(kept)


def test_a_sweeps_predictions_can_be_read_without_the_data(place):
    records = [read_record(place / "trials" / str(i)) for i in (0, 1)]
    (file,) = place.glob("trials/**/names-*.json")
    assert file == place / "trials" / f"names-{records[0].data['fingerprint']}.json"
    about = json.loads(file.read_text())
    names = json.loads((place / "trials/1/adapter.json").read_text())["class_names"]
    with np.load(place / "trials/1" / PREDICTIONS) as arrays:
        for split in ("val", "test"):
            files = [Path(about["root"], about["names"][i]) for i in arrays[f"{split}.ids"]]
            assert [file.parent.name for file in files] == [names[label] for label in arrays[f"{split}.labels"]]
            assert all(file.is_file() for file in files)
    assert not [*place.glob("fake/**/names-*.json")], "they are in a package"


def test_data_without_files_shows_what_the_model_has(place, tmp_path, call, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("evaluate", place / "fake/0", "--split", "train", "--csv", "p.csv", "--out", "out")[0] == 0
    found, _ = api.evaluate(place / "fake/0", "train")
    rows = pd.read_csv("p.csv")
    assert sorted(rows["path"]) == sorted(found.ids)
    monkeypatch.setattr(evaluate, "ROWS", 1)
    assert "... 3 more" in call("evaluate", place / "fake/0")[1]
