"""The commands on a trained trial: on its own base and data wherever they are, and on no others."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from helpers import train_together, trial_config
from PIL import Image
from plain_models import SIZES, plain_model, timm_config
from torchvision.models import VisionTransformer

from lora_vit import api, load_adapter, merge_adapter, predict, preprocessing, trained
from lora_vit.build import build_setup
from lora_vit.cli import completed_trial
from lora_vit.config import from_dict, ids, trial_id
from lora_vit.distributed import Process
from lora_vit.errors import ConfigError, RecordError
from lora_vit.metrics import figures
from lora_vit.records import read_record

CLASSES = ("ant", "bee", "cat")
COMMANDS = ("evaluate", "predict", "merge", "export")


def save_weights(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save({"model": VisionTransformer(**SIZES).state_dict()}, path)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with ``trial/``, its ``base.pth`` and its ``images/``, which it was given by relative paths."""
    place = tmp_path_factory.mktemp("place")
    rng = np.random.default_rng(0)
    for i, name in enumerate(CLASSES):
        (place / "images" / name).mkdir(parents=True)
        for n in range(20):
            pixels = rng.integers(0, 100, (16, 16, 3)) + np.eye(3, dtype=int)[i] * 120
            Image.fromarray(pixels.astype(np.uint8)).save(place / "images" / name / f"{n:02}.png")
    save_weights(place / "base.pth", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        config = trial_config(
            "data.name=imagefolder",
            "data.root=images",
            f"data.cache_dir={place}/cache",
            "model.weights=base.pth",
            "trainer.precision=fp32",
            "optimizer.lr=3e-3",
        )
        train_together([config], place / "trials")
    (place / "trials" / "0").rename(place / "trial")
    return place


@pytest.fixture
def copy(place, tmp_path, monkeypatch) -> Path:
    """The same in a folder that a test may change; its record names the paths in it. The test runs elsewhere."""
    copy = tmp_path / "place"
    shutil.copytree(place, copy)
    edit_record(copy, "model", weights=str(copy / "base.pth"))
    edit_record(copy, "data", root=str(copy / "images"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return copy


def edit_record(place: Path, key: str, **values: object) -> None:
    """Change what the trial's record says; with other settings it is that of the changed trial."""
    path = place / "trial" / "record.json"
    record = json.loads(path.read_text())
    (record["config"] if key in record["config"] else record)[key] |= values
    config = from_dict(record["config"])
    record |= {"trial_id": trial_id(config), "cell_id": ids(config)[1]}
    path.write_text(json.dumps(record))


def arguments(command: str, place: Path) -> list[str | Path]:
    more = {
        "evaluate": [],
        "predict": [place / "images" / "ant" / "00.png"],
        "merge": ["--out", "merged.safetensors"],
        "export": ["--format", "torch_export", "--out", "exported"],
    }
    return [place / "trial", *more[command]]


def assert_refused(done: tuple[int, str, str], *words: str) -> None:
    """One line with the words, no figure, and nothing written."""
    code, out, err = done
    assert (code, err.count("\n"), "%" in out) == (1, 1, False)
    for word in ("error: ", *words):
        assert word in err
    assert list(Path.cwd().iterdir()) == []


def test_relative_paths_are_recorded_as_absolute_ones_of_the_same_trial(place):
    record = read_record(place / "trial")
    assert record.config["model"]["weights"] == str(place / "base.pth")
    assert record.config["data"]["root"] == str(place / "images")
    config = from_dict(record.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        config.model.weights, config.data.root = "base.pth", "images"
        assert trial_id(config) == record.trial_id


def test_fetch_decodes_what_a_trial_needs_once(place, tmp_path, call):
    given = ["data=imagefolder", f"data.root={place}/images", "model=vit_tiny", "data.batch_size=8"]
    given.append(f"data.cache_dir={tmp_path}/cache")
    code, out, err = call("fetch", *given)
    assert (code, err) == (0, "")
    assert "ant" in out
    assert "model=vit_tiny model.weights=GLYPHS_V1 data=imagefolder" in out
    held = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("images-*.npy")}
    assert held
    assert call("fetch", *given)[0] == 0
    assert {file: file.stat().st_mtime_ns for file in held} == held


@pytest.mark.parametrize(("command", "moved"), [("evaluate", False), *((command, True) for command in COMMANDS)])
def test_a_command_runs_from_anywhere(moved, command, copy, call):
    file, given = copy / "base.pth", arguments(command, copy)
    if moved:
        file = file.rename(copy / "moved.pth")
        given += ["--weights", file]
    if moved and command == "evaluate":
        given += ["--data-root", (copy / "images").rename(copy / "pictures")]
    code, out, err = call(command, *given)
    assert (code, err) == (0, "")
    assert f"model.weights={file}: 2 blocks of width 32, patch 8" in out
    assert ", taken from 'model'" in out
    if command == "evaluate":
        assert f"Test Accuracy: {read_record(copy / 'trial').metrics['test_accuracy']:.2%}  (12 images)" in out
        assert "the record says" not in out


WRONG: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "other weights": (
        lambda place: save_weights(place / "base.pth", 2),
        ["the model's ", "not those that the adapter was trained on", "give these"],
    ),
    "weights that moved": (
        lambda place: (place / "base.pth").rename(place / "moved"),
        ["/base.pth is not there", "--weights"],
    ),
    "no record": (
        lambda place: (place / "trial" / "record.json").unlink(),
        ["/trial has ", ": give "],  # to export it could be save_adapter's, whose base is asked for
    ),
    "a record that was edited": (
        lambda place: edit_record(place, "environment", precision=None),
        ["record.json was edited", "environment.precision is None"],
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_not_the_trials_own_is_refused(wrong, command, copy, call):
    change, words = WRONG[wrong]
    change(copy)
    assert_refused(call(command, *arguments(command, copy)), *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda images: (images / "ant").rename(images / "wasp"), "it lacks 'ant'"),
        (lambda images: shutil.copytree(images / "cat", images / "ant", dirs_exist_ok=True), "other contents or"),
        (lambda images: [shutil.copy(p, f"{p}.png") for p in (images / "ant").glob("0[0-4].png")], "36 then, 39 now"),
        (lambda images: images.rename(images.parent / "pictures"), "--data-root="),
    ],
    ids=["renamed", "other images", "more images", "moved"],
)
def test_evaluate_refuses_other_data(change, words, copy, call):
    change(copy / "images")
    assert_refused(call("evaluate", copy / "trial"), words)


@pytest.mark.parametrize(
    ("command", "given", "words"),
    [
        ("evaluate", ["--data-root", ""], "--data-root has no value"),  # as of a shell's variable that is not set
        ("evaluate", ["--weights", ""], " is not there"),
        ("evaluate", ["--split", "tset"], "--split tset does not exist here (one of: "),
        ("predict", ["images/ant/00.png", "--top", "0"], "--top 0 is impossible: give a number from 1 to 3"),
        ("predict", ["images/ant/00.png", "--top", "4"], "--top 4 is impossible"),
        ("predict", ["empty"], "no image below empty: give image files"),
        ("predict", ["images/ant/00.png", "--csv", "images/ant/00.png"], "--csv images/ant/00.png: give a file name"),
        ("merge", ["--out", "trial/adapter.safetensors"], "--out trial/adapter.safetensors is there already"),
    ],
)
def test_an_option_that_cannot_be(command, given, words, copy, call, monkeypatch):
    (copy / "empty").mkdir()
    monkeypatch.chdir(copy)
    before = {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()}
    code, out, err = call(command, "trial", *given)
    assert (code, "%" in out, words in err) == (1, False, True)
    assert {path: path.read_bytes() for path in copy.rglob("*.*") if path.is_file()} == before


def test_a_sweep_stands_for_its_best_cells_first_seed_and_a_name_for_the_sweep(copy, call):
    (copy / "sweep.json").write_text('{"trials": {}}')
    os.mkdir("outputs")
    os.symlink(copy.parent, "outputs/sweeps")
    trial = "outputs/sweeps/place/trial"
    code, out, _ = call("summarize", "place", "--no-plots")
    assert (code, f"python -m lora_vit.predict {trial} IMAGE" in out) == (0, True)
    assert call("evaluate", "place")[:2] == call("evaluate", trial)[:2]
    image = copy / "images/ant/00.png"
    code, out, err = call("predict", "place", image)
    assert (out, err.startswith(f"{trial}: ")) == (call("predict", trial, image)[1], True)


def test_a_data_root_that_could_have_no_effect_is_refused(copy):
    edit_record(copy, "data", name="digits", root=None)
    with pytest.raises(RecordError, match="--data-root has no effect: data=digits"):
        completed_trial(copy / "trial", None, "cpu", "x")


def test_another_figure_than_the_recorded_one_is_shown(copy, call):
    edit_record(copy, "metrics", test_accuracy=0.125)
    code, out, _ = call("evaluate", copy / "trial")
    assert (code, "the record says 12.5000%" in out) == (1, True)


def test_the_merged_file_and_the_printed_lines_are_all_one_needs(copy, call):
    """Without the data; the lines are executed, and the file's own words on normalisation give what predict says."""
    image = copy / "images" / "bee" / "03.png"
    _, predicted, _ = call("predict", copy / "trial", image)
    kept = image.rename(copy / "image.png")
    shutil.rmtree(copy / "images")
    code, out, err = call("merge", copy / "trial", "--out", "it's merged.safetensors")
    assert (code, err) == (0, "")
    assert "0 of 16 predictions changed" in out
    names: dict = {}
    exec("\n".join(out.splitlines()[-3:]), names)
    with safetensors.safe_open("it's merged.safetensors", "pt") as file:
        assert list(file.metadata()) == ["lora_vit"]
        about = json.loads(file.metadata()["lora_vit"])
    assert about["class_names"] == list(CLASSES)
    how = about["preprocessing"]
    assert (how["image_size"], how["decoded_size"], how["crop"], how["background"]) == (16, 16, "centre", [255] * 3)
    pixels = torch.from_numpy(np.asarray(Image.open(kept)).transpose(2, 0, 1) / 255).float()
    mean, std = (torch.tensor(how[key])[:, None, None] for key in ("mean", "std"))
    prepared = torch.from_numpy(preprocessing("it's merged.safetensors")(kept))
    torch.testing.assert_close(prepared, (pixels - mean) / std)
    with torch.no_grad():
        p = names["model"].eval()(prepared[None]).softmax(-1)[0]
    best = int(p.argmax())
    assert f"{float(p[best]):.2%}  {CLASSES[best]}" in predicted.splitlines()[2]
    assert sorted(os.listdir()) == ["it's merged.safetensors"]


def test_a_merged_model_that_computes_something_else_is_not_written(copy, call, monkeypatch):
    def a_little_off(*given: object) -> dict[str, torch.Tensor]:
        state = merged_state_dict(*given)
        state["heads.head.bias"] += 0.01
        return state

    merged_state_dict = trained.merged_state_dict
    monkeypatch.setattr(trained, "merged_state_dict", a_little_off)
    done = call("merge", copy / "trial", "--out", "m.safetensors")
    assert_refused(done, "the merged model differs by 1.00e-02", "nothing written")


@pytest.mark.parametrize(("command", "option"), [("predict", "--csv"), ("merge", "--out")])
def test_the_outputs_place_is_tested_before_any_work(command, option, copy, call):
    (copy / "base.pth").unlink()  # so that work would end in another line
    given = arguments(command, copy)[: 2 if command == "predict" else 1]
    suffix = ".csv" if command == "predict" else ".safetensors"
    (folder := copy / f"x{suffix}").mkdir()
    for out in (Path("nowhere", folder.name), folder, Path("/proc", folder.name), Path("x" * 242 + suffix)):
        assert_refused(call(command, *given, option, out), f"{option} {out} cannot be written", "folder that is there")


def read_csv(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_can_be_read_is_predicted_and_the_rest_is_named(copy, call, monkeypatch):
    """Batches give what single images give."""
    monkeypatch.setattr(predict, "BATCH", 3)
    good = [copy / "images" / name / f"0{i}.png" for name in CLASSES for i in range(3)]
    (copy / "broken.png").write_bytes(good[0].read_bytes()[:60])
    good.append(good[-1])  # given twice, shown twice
    given = [*good[:4], copy / "broken.png", *good[4:], copy / "absent.png"]
    code, out, err = call("predict", copy / "trial", *given, "--csv", "p.csv", "--top", "2")
    broken, absent, total = err.splitlines()
    assert (code, total) == (1, "error: 2 of 12 images could not be read")
    assert broken.startswith(f"error: {copy}/broken.png cannot be read")
    assert absent.startswith(f"error: {copy}/absent.png cannot be read")
    rows = read_csv("p.csv")
    assert [row["image"] for row in rows[::2]] == [str(p) for p in good]
    assert [line for line in out.splitlines() if line.endswith(".png")] == [str(p) for p in good]
    call("predict", copy / "trial", good[4], "--csv", "alone.csv")
    ((a, b),) = zip(read_csv("alone.csv"), rows[8:9], strict=True)  # one row an image, if no more are asked for
    assert (a["image"], a["rank"], a["class"]) == (b["image"], b["rank"], b["class"])
    assert float(a["probability"]) == pytest.approx(float(b["probability"]), rel=1e-5)  # added in another order


def test_a_folder_is_all_images_below_it(copy, call):
    expected = [*map(str, sorted((copy / "images").glob("*/*.png")))]
    expected += [path.replace("/ant/", "/link/") for path in expected if "/ant/" in path]
    (copy / "images" / "notes.txt").write_text("no image")
    (copy / "images" / ".hidden.png").write_text("no image")
    (copy / "images" / "link").symlink_to(copy / "images" / "ant")
    single = copy / "images" / "bee" / "00.png"
    code, _, err = call("predict", copy / "trial", copy / "images", single, "--csv", "p.csv", "--top", "1")
    passed = {"1 hidden (.hidden.png)", "1 no images (notes.txt)"}
    assert (code, set(err.strip().removeprefix("passed over: ").split(", "))) == (0, passed)
    assert [r["image"] for r in read_csv("p.csv")] == [*expected, str(single)]


def test_odd_names_do_no_harm(copy, call):
    odd = [os.fsdecode(b"bad \xff byte.png"), "two\nlines.png", 'comma, "quote".png', "grün.png"]
    for name in odd:
        shutil.copy(copy / "images" / "ant" / "00.png", name)
    code, out, err = call("predict", copy / "trial", *odd, "absent\nfile.png", "--top", "1", "--csv", "p.csv")
    assert (code, err.count("\n")) == (1, 2)
    out.encode()
    shown = [line for line in out.splitlines() if line.endswith(".png")]
    assert shown == [r"bad \xff byte.png", r"two\nlines.png", 'comma, "quote".png', "grün.png"]
    assert [row["image"] for row in read_csv("p.csv")] == [r"bad \xff byte.png", *odd[1:]]


def test_the_api_returns_what_the_commands_print(copy, call):
    folder, images = copy / "trial", sorted((copy / "images").glob("*/00.png"))
    predictions, record = api.evaluate(folder, "val")
    assert figures("val", predictions).items() <= record.metrics.items()
    assert record.trial_id == read_record(folder).trial_id
    assert f"Val Accuracy: {record.metrics['val_accuracy']:.2%} " in call("evaluate", folder, "--split", "val")[1]
    rows, unreadable = api.predict(folder, [*map(str, images), "absent.png"], top=2)
    call("predict", folder, *images, "--top", "2", "--csv", "p.csv")
    assert [tuple(map(str, row)) for row in rows] == [tuple(row.values()) for row in read_csv("p.csv")]
    assert (len(unreadable), "absent.png cannot be read" in unreadable[0]) == (1, True)
    names: dict = {}
    exec(api.merge(folder, "m.safetensors"), names)
    assert api.export(folder, "torch_export", "out") == []
    with pytest.raises(ConfigError, match="--format=foo is unknown"):
        api.export(folder, "foo", "other")
    x = torch.from_numpy(preprocessing("out")(images[0]))[None]
    p = names["model"].eval()(x).softmax(-1)[0].max().item()
    assert p == pytest.approx(rows[0][3], rel=1e-4)  # fp32
    assert torch.export.load("out/model.pt2").module()(x).softmax(-1).max().item() == pytest.approx(p, rel=1e-4)
    for wrong in (lambda: api.evaluate("absent"), lambda: api.merge(folder, "m.safetensors")):
        with pytest.raises(RecordError):
            wrong()


WEIGHTS = "model.weights=base.pth"
KINDS = [
    *((trial_config, (WEIGHTS, *settings)) for settings in (
        ("lora.bias=all",),
        ("lora.bias=lora_only", "lora.targets=[fc1,k]"),
        ("lora.blocks=[1]", "lora.targets=[v,fc2]", "lora.scaling=rslora"),
        ("lora=none",),
        ("lora=full",),
        ("model.image_size=24", "lora.dropout=0.3"),
    )),
    (trial_config, ("model.weights=null",)),
    *((timm_config, (f"model.name={name}", *settings)) for name in ("small_vit", "small_eva02")
      for settings in (("lora.blocks=[1]", "lora.dropout=0.1"), ("lora=none",), ("lora=full",))),
]  # fmt: skip


@pytest.mark.parametrize(("config_of", "settings"), KINDS)
def test_every_kind_of_trial_comes_back(config_of, settings, place, tmp_path, monkeypatch, call):
    """Evaluated, loaded and merged it says what it said when it was trained; the printed lines load the file."""
    if config_of is timm_config:
        pytest.importorskip("timm")
    monkeypatch.chdir(place)
    config = config_of("trainer.precision=fp32", "optimizer.lr=3e-3", *settings)
    (outcome,) = train_together([config], tmp_path)
    folder = tmp_path / "0"
    assert call("evaluate", folder, "--split", "val")[0] == 0
    code, said, _ = call("merge", folder, "--out", tmp_path / "merged.safetensors")
    assert code == 0
    names: dict = {}
    exec("\n".join(said.splitlines()[-3:]), names)
    models = [names["model"], load_adapter(plain_model(folder), folder), merge_adapter(plain_model(folder), folder)]
    setup = build_setup(config, Process())
    for model in models:
        with torch.no_grad():
            predicted = model.eval()(setup.transform.eval(setup.samples.gather(setup.data.splits["val"])[0])).argmax(-1)
        assert predicted.tolist() == outcome.predicted.tolist()
