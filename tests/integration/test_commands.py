"""The commands on a trained trial: on its own base and data wherever they are, and on no others."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch
from helpers import train_together, trial_config
from PIL import Image
from safetensors.torch import load_file
from torchvision.models import VisionTransformer
from torchvision.models.vision_transformer import interpolate_embeddings

from lora_vit import interop, load_adapter, merge_adapter, predict
from lora_vit.build import build_setup
from lora_vit.config import cell_id, from_dict, trial_id
from lora_vit.distributed import Process
from lora_vit.lora import adapter
from lora_vit.models.vit import build_trunk
from lora_vit.records import read_record

SIZES = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
CLASSES = ("ant", "bee", "cat")


def save_weights(path: Path, seed: int) -> None:
    torch.manual_seed(seed)
    torch.save({"model": VisionTransformer(**SIZES).state_dict()}, path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with ``trial/``, its ``base.pth`` and its ``images/``, which it was given by relative paths."""
    place = tmp_path_factory.mktemp("trained")
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
def copy(trained, tmp_path, monkeypatch) -> Path:
    """The same in a folder that a test may change; its record names the paths in it. The test runs elsewhere."""
    place = tmp_path / "place"
    shutil.copytree(trained, place)
    record = json.loads((place / "trial" / "record.json").read_text())
    record["config"]["model"]["weights"] = str(place / "base.pth")
    record["config"]["data"]["root"] = str(place / "images")
    (place / "trial" / "record.json").write_text(json.dumps(record))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return place


def every_command(place: Path) -> dict[str, list[str | Path]]:
    return {
        "evaluate": [place / "trial"],
        "predict": [place / "trial", place / "images" / "ant" / "00.png"],
        "merge": [place / "trial", "--out", "merged.safetensors"],
    }


def test_relative_paths_are_recorded_as_absolute_ones_of_the_same_trial(trained):
    record = read_record(trained / "trial")
    assert record.config["model"]["weights"] == str(trained / "base.pth")
    assert record.config["data"]["root"] == str(trained / "images")
    config = from_dict(record.config)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(trained)
        config.model.weights, config.data.root = "base.pth", "images"
        assert trial_id(config) == record.trial_id


@pytest.mark.parametrize("word", ["none", "None", "null"])
def test_none_and_null_are_random_weights(word):
    assert trial_config(f"model.weights={word}").model.weights is None


@pytest.mark.parametrize("module", ["evaluate", "predict", "merge"])
def test_a_command_runs_from_anywhere(module, trained, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(module, *every_command(trained)[module])
    assert (code, err) == (0, "")
    assert f"model.weights={trained}/base.pth: 2 blocks of width 32, patch 8" in out
    assert ", taken from 'model'" in out
    if module == "evaluate":
        assert f"Test Accuracy: {read_record(trained / 'trial').metrics['test_accuracy']:.2%}  (12 images)" in out
        assert "the record says" not in out


@pytest.mark.parametrize("module", ["evaluate", "predict", "merge"])
def test_other_weights_under_the_same_path(module, copy, call):
    save_weights(copy / "base.pth", 2)
    code, out, err = call(module, *every_command(copy)[module])
    assert code == 1
    assert err.startswith("error: the model's ")
    assert "not those that the adapter was trained on" in err
    assert err.count("\n") == 1
    assert "%" not in out
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("module", ["evaluate", "predict", "merge"])
def test_weights_that_moved_are_asked_for(module, copy, call):
    (copy / "base.pth").rename(copy / "moved")
    arguments = every_command(copy)[module]
    code, _, err = call(module, *arguments)
    assert (code, err) == (
        1,
        f"error: {copy}/base.pth is not there: say with --weights where the trial's weights are now\n",
    )
    code, _, err = call(module, *arguments, "--weights", copy / "moved")
    assert (code, err) == (0, "")


def test_data_that_moved(copy, call):
    (copy / "images").rename(copy / "pictures")
    code, _, err = call("evaluate", copy / "trial")
    assert (code, err.count("\n")) == (1, 1)
    assert "is not a folder" in err
    code, out, err = call("evaluate", copy / "trial", "--data-root", copy / "pictures")
    assert (code, err) == (0, "")
    assert "the record says" not in out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("renamed", "it lacks 'ant'"),
        ("one class more", "it has 'dog' in addition"),
        ("one class less", "it lacks 'cat'"),
        ("more images", "train 36 then, 39 now"),
        ("another image", "other contents or splits of as many images"),
    ],
)
def test_evaluate_refuses_other_data(change, message, copy, call):
    images = copy / "images"
    if change == "renamed":
        (images / "ant").rename(images / "wasp")
    elif change == "one class more":
        shutil.copytree(images / "cat", images / "dog")
    elif change == "one class less":
        shutil.rmtree(images / "cat")
    elif change == "more images":
        for i in range(5):
            shutil.copy(images / "ant" / f"{i:02}.png", images / "ant" / f"new{i}.png")
    else:
        (images / "ant" / "00.png").rename(images / "ant" / "99.png")
    code, out, err = call("evaluate", copy / "trial")
    assert code == 1
    assert message in err
    assert err.count("\n") == 1
    assert "Accuracy" not in out


@pytest.mark.parametrize(
    ("option", "told"), [("--data-root", "data.root has no value"), ("--weights", " is not there")]
)
def test_an_empty_place_is_not_the_recorded_one(option, told, copy, call):
    """As of a shell's variable that is not set."""
    code, out, err = call("evaluate", copy / "trial", option, "")
    assert (code, out, told in err) == (1, "", True)


def test_a_data_root_that_could_have_no_effect_is_refused(copy, call):
    record = json.loads((copy / "trial" / "record.json").read_text())
    record["config"]["data"] |= {"name": "digits", "root": None}
    config = from_dict(record["config"])
    record |= {"trial_id": trial_id(config), "cell_id": cell_id(config)}
    (copy / "trial" / "record.json").write_text(json.dumps(record))
    code, _, err = call("evaluate", copy / "trial", "--data-root", "x")
    assert code == 1
    assert "--data-root has no effect: data=digits" in err


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
    assert about["image_size"] == 16
    pixels = torch.from_numpy(np.asarray(Image.open(kept)).transpose(2, 0, 1) / 255).float()
    mean, std = (torch.tensor(about[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        p = names["model"].eval()(((pixels - mean) / std)[None]).softmax(-1)[0]
    best = int(p.argmax())
    assert f"{float(p[best]):.2%}  {CLASSES[best]}" in predicted.splitlines()[2]
    assert sorted(os.listdir()) == ["it's merged.safetensors"]


def test_a_merged_model_that_computes_something_else_is_not_written(copy, call, monkeypatch):
    def a_little_off(base: torch.nn.Module, bound: adapter.Adapter) -> dict[str, torch.Tensor]:
        state = merged_state_dict(base, bound)
        state["heads.head.bias"] += 0.01
        return state

    merged_state_dict = interop.merged_state_dict
    monkeypatch.setattr(interop, "merged_state_dict", a_little_off)
    code, _, err = call("merge", copy / "trial", "--out", "m.safetensors")
    assert code == 1
    assert "the merged model differs by 1.00e-02; nothing written" in err
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("module", ["evaluate", "predict", "merge"])
def test_a_folder_without_a_record_or_none_at_all(module, copy, call):
    for place in (copy / "images", copy / "nowhere"):
        code, out, err = call(module, place, *every_command(copy)[module][1:])
        assert (code, out, err) == (1, "", f"error: {place} has no record.json: give the folder of a trial\n")


@pytest.mark.parametrize("option", ["predict --csv", "merge --out"])
@pytest.mark.parametrize("where", ["no folder", "a folder"])
def test_the_outputs_place_is_tested_before_any_work(option, where, copy, call):
    module, name = option.split()
    (copy / "base.pth").unlink()  # so that work would end in another line
    out = Path("nowhere" if where == "no folder" else "", "x.csv" if module == "predict" else "x.safetensors")
    if where == "a folder":
        out.mkdir()
    arguments = [*every_command(copy)[module][:2], name, out] if module == "predict" else [copy / "trial", name, out]
    code, _, err = call(module, *arguments)
    assert code == 1
    assert f"{name} {out} cannot be written" in err
    assert err.count("\n") == 1


def test_a_result_takes_no_other_files_place(copy, call):
    adapter = copy / "trial" / "adapter.safetensors"
    before = adapter.read_bytes()
    code, _, err = call("merge", copy / "trial", "--out", adapter)
    assert (code, err) == (1, f"error: --out {adapter} is there already: give a new file\n")
    assert adapter.read_bytes() == before
    image = next((copy / "images").rglob("*.png"))  # --csv *.png
    before = image.read_bytes()
    code, _, err = call("predict", copy / "trial", image, "--csv", image)
    assert (code, err) == (1, f"error: --csv {image}: give a file name that ends in .csv\n")
    assert image.read_bytes() == before


@pytest.mark.parametrize("module", ["evaluate", "predict", "merge"])
def test_a_record_that_lost_its_environment_is_told(module, copy, call):
    path = copy / "trial" / "record.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "environment": {}}))
    code, _, err = call(module, *every_command(copy)[module])
    assert (code, err) == (1, "error: record.json was edited: its environment.precision is None\n")


def read_csv(path: str) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_what_can_be_read_is_predicted_and_the_rest_is_named(copy, call, monkeypatch):
    monkeypatch.setattr(predict, "BATCH", 3)
    good = [copy / "images" / name / f"0{i}.png" for name in CLASSES for i in range(3)]
    (copy / "broken.png").write_bytes(good[0].read_bytes()[:60])
    good.append(good[-1])  # given twice, shown twice
    given = [*good[:4], copy / "broken.png", *good[4:], copy / "absent.png"]
    code, out, err = call("predict", copy / "trial", *given, "--csv", "p.csv", "--top", "1")
    assert code == 1
    lines = err.splitlines()
    assert [line.split(" cannot be read as an image")[0] for line in lines[:2]] == [
        f"error: {copy}/broken.png",
        f"error: {copy}/absent.png",
    ]
    assert lines[2:] == ["error: 2 of 12 images could not be read"]
    rows = read_csv("p.csv")
    assert [row["image"] for row in rows] == [str(p) for p in good]
    assert [line for line in out.splitlines() if line.endswith(".png")] == [str(p) for p in good]


def test_batches_give_what_single_images_give(copy, call):
    images = sorted((copy / "images").rglob("*.png"))[:7]
    call("predict", copy / "trial", *images, "--csv", "together.csv")
    together = read_csv("together.csv")
    for i, image in enumerate(images):
        call("predict", copy / "trial", image, "--csv", "alone.csv")
        for a, b in zip(read_csv("alone.csv"), together[3 * i : 3 * i + 3], strict=True):
            assert (a["image"], a["class"]) == (b["image"], b["class"])
            # fp32 in another order of additions
            assert float(a["probability"]) == pytest.approx(float(b["probability"]), rel=1e-5)


def test_a_folder_is_all_images_below_it(copy, call):
    expected = [*map(str, sorted((copy / "images").glob("*/*.png")))]
    expected += [path.replace("/ant/", "/link/") for path in expected if "/ant/" in path]
    (copy / "images" / "notes.txt").write_text("no image")
    (copy / "images" / ".hidden.png").write_text("no image")
    (copy / "images" / "link").symlink_to(copy / "images" / "ant")
    single = copy / "images" / "bee" / "00.png"
    code, _, err = call("predict", copy / "trial", copy / "images", single, "--csv", "p.csv", "--top", "2")
    assert code == 0
    assert sorted(err.strip().removeprefix("passed over: ").split(", ")) == [
        "1 hidden (.hidden.png)",
        "1 no images (notes.txt)",
    ]
    rows = read_csv("p.csv")
    assert [r["image"] for r in rows[::2]] == [*expected, str(single)]
    assert [r["rank"] for r in rows[:2]] == ["1", "2"]


def test_a_folder_without_images(copy, call):
    (copy / "empty").mkdir()
    code, _, err = call("predict", copy / "trial", copy / "empty")
    assert (code, err.count("\n")) == (1, 1)
    assert f"no image below {copy}/empty" in err


@pytest.mark.parametrize(("top", "good"), [("1", True), ("3", True), ("0", False), ("4", False), ("-2", False)])
def test_top_is_from_one_to_the_number_of_classes(top, good, copy, call):
    code, out, err = call("predict", copy / "trial", copy / "images" / "ant" / "00.png", "--top", top)
    if good:
        assert (code, len(out.splitlines()) - 2) == (0, int(top))
    else:
        assert (code, err) == (1, f"error: --top {top} is impossible: give a number from 1 to 3\n")


def test_odd_names_do_no_harm(copy, call):
    source = copy / "images" / "ant" / "00.png"
    odd = [os.fsdecode(b"bad \xff byte.png"), "two\nlines.png", 'comma, "quote".png', "grün.png"]
    for name in odd:
        shutil.copy(source, name)
    code, out, err = call("predict", copy / "trial", *odd, "absent\nfile.png", "--top", "1", "--csv", "p.csv")
    assert code == 1
    assert err.count("\n") == 2
    out.encode()
    assert [line for line in out.splitlines() if line.endswith(".png")] == [
        r"bad \udcff byte.png",
        r"two\nlines.png",
        'comma, "quote".png',
        "grün.png",
    ]
    assert [row["image"] for row in read_csv("p.csv")] == [r"bad \udcff byte.png", *odd[1:]]


KINDS = [
    ("lora.bias=all",),
    ("lora.bias=lora_only", "lora.targets=[fc1,k]"),
    ("lora.blocks=[1]", "lora.targets=[v,fc2]", "lora.scaling=rslora"),
    ("lora=none",),
    ("lora=full",),
    ("model.image_size=24", "lora.dropout=0.3"),
    ("model.weights=null",),
]


@pytest.mark.parametrize("settings", KINDS, ids=" ".join)
def test_every_kind_of_trial_comes_back(settings, trained, tmp_path, call):
    """Evaluated, loaded, merged and predicted it says what it said when it was trained."""
    config = trial_config(f"model.weights={trained}/base.pth", "trainer.precision=fp32", "optimizer.lr=3e-3", *settings)
    (outcome,) = train_together([config], tmp_path)
    folder = tmp_path / "0"
    assert call("evaluate", folder, "--split", "val")[0] == 0
    assert call("merge", folder, "--out", tmp_path / "merged.safetensors")[0] == 0
    sizes = {**SIZES, "image_size": config.model.image_size}
    base = build_trunk(*sizes.values()).state_dict()
    if config.model.weights is not None:
        saved = torch.load(trained / "base.pth")["model"]
        base = interpolate_embeddings(sizes["image_size"], 8, OrderedDict(saved))
    base = {name: t for name, t in base.items() if not name.startswith("heads.")}
    models = [VisionTransformer(**sizes, num_classes=4) for _ in range(3)]
    for model in models:
        model.load_state_dict(base, strict=False)
    load_adapter(models[0], folder)
    merge_adapter(models[1], folder)
    models[2].load_state_dict(load_file(tmp_path / "merged.safetensors"))
    setup = build_setup(config, Process())
    for model in models:
        with torch.no_grad():
            predicted = [model.eval()(batch.images).argmax(-1) for batch in setup.eval_stream("val", 7)]
        assert torch.cat(predicted).tolist() == outcome.predicted.tolist()
