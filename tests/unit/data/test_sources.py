"""Data sets by a table, by ImageNet's lists, of torchvision, of Hugging Face and of one's own: small ones."""

from __future__ import annotations

import re
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torchvision.datasets
from pictures import data_config, fresh, paint, refused, shades
from PIL import Image
from scipy.io import savemat

from lora_vit import api
from lora_vit.config import DATASETS, trial_id
from lora_vit.data import sets
from lora_vit.data.dataset import Wanted, forget, known_content, load_data
from lora_vit.data.table import find

CLASSES = ["cat", "dog"]


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes of six images; grey levels 10 to 15 and 110 to 115."""
    for c, name in enumerate(CLASSES):
        for i in range(6):
            paint(tmp_path / "pets" / name / f"{name}{i}.png", 100 * c + 10 + i)
    return tmp_path / "pets"


def table_of(pets: Path, form: str = "csv", /, **columns: Any) -> Path:
    """A table of the pets in another order, with columns by the image's path; without: ``image_id`` and ``label``."""
    columns = columns or {"image_id": lambda path: path.stem, "label": lambda path: path.parent.name}
    paths = sorted((path.relative_to(pets) for path in pets.rglob("*.png")), key=lambda path: path.name[::-1])
    frame = pd.DataFrame({name: [of(path) for path in paths] for name, of in columns.items()})
    path = pets.parent / f"train.{form}"
    if form == "jsonl":
        frame.to_json(path, lines=True, orient="records")
    elif form == "parquet":
        pytest.importorskip("pyarrow")
        frame.to_parquet(path)
    else:
        signs = {"csv": ",", "tsv": "\t", "txt": ";"}
        frame.to_csv(path, sep=signs[form], index=form == "csv", encoding="utf-8-sig" if form == "txt" else "utf-8")
    return path


def by_table(tmp_path: Path, **changes: Any) -> Any:
    given = {"root": None, "labels": str(tmp_path / "train.csv"), "images": str(tmp_path / "pets"), **changes}
    return data_config(tmp_path, "table", **given)


@pytest.mark.parametrize("kind", ["csv", "tsv", "txt", "jsonl", "parquet"])
@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"Id": lambda p: p.name, "other": lambda p: p.parent.name},
        {"file_name": str, "id": lambda p: p.stem, "species": lambda p: p.parent.name, "age": lambda p: 3},
        {"path": lambda p: f"pets/{p.with_suffix('')}", "Class": lambda p: p.parent.name, "is_valid": lambda p: 0},
    ],
    ids=["stems", "two columns", "paths", "paths from above"],
)
def test_a_table_is_the_data_set_of_its_class_folders(kind, columns, pets, tmp_path):
    labels = table_of(pets, kind, **columns)
    data, folders = fresh(by_table(tmp_path, labels=str(labels))), fresh(data_config(tmp_path))
    assert (data.content, data.class_names, shades(data)) == (folders.content, CLASSES, shades(folders))
    assert ("1 columns that would divide the images otherwise (is_valid)" in data.line(8)) == ("is_valid" in columns)
    beside = fresh(by_table(tmp_path, labels=str(labels), images=None))  # the table's folder
    assert beside.content == data.content
    assert labels.name not in beside.line(8), "it is used"


def test_parts_and_groups_of_a_table(pets, tmp_path):
    words = dict(zip("012345", ("Train", "training", "valid", "val", "test", "Testing"), strict=True))
    path = table_of(pets, image=str, target=lambda p: {"cat": 10, "dog": 9}[p.parent.name],
                    split=lambda p: words[p.stem[-1]], patient=lambda p: p.stem[-1])  # fmt: skip
    data = fresh(by_table(tmp_path, val_fraction=None, test_fraction=None))
    assert data.class_names == ["9", "10"], "numbers by value"
    by_part = {part: [shades(data)[i] for i in ids] for part, ids in data.splits.items()}
    assert by_part == {"train": [10, 11, 110, 111], "val": [12, 13, 112, 113], "test": [14, 15, 114, 115]}
    wanted = Wanted("table", pets, tmp_path / "cache", group="patient", labels=str(path))
    found = find(wanted)
    assert [name[-5] for name in found.names] == found.groups.tolist()
    assert find(Wanted("table", pets, tmp_path / "cache", labels=str(path))).groups is None
    path = table_of(pets, image=str, target=lambda p: {"cat": "NA", "dog": "null"}[p.parent.name])
    assert find(Wanted("table", pets, tmp_path / "cache", labels=str(path))).class_names == ["NA", "null"], "words"


WRONG = {  # what is done to the rows [name, label] of twelve pets, settings, and what is said
    "no label": (lambda rows: rows[3].__setitem__(1, " "), {}, ["1 rows without label (cat3.png)"]),
    "no name": (lambda rows: rows[3].__setitem__(0, ""), {}, ["1 rows without a file's name (row 5)"]),
    "missing": (lambda rows: rows.extend([[f"{i}.png", "cat"] for i in range(9)]), {},
                ["9 rows of files that are not there, or no images (0.png, 1.png, 2.png, ...)"]),
    "another label": (lambda rows: rows.append(["cat3.png", "dog"]), {},
                      ["2 rows of files with several labels or parts (cat3.png, cat3.png)"]),
    "another folder": (lambda rows: rows[3].__setitem__(0, "dog/cat3.png"), {}, ["not there", "(dog/cat3.png)"]),
    "several": (lambda rows: rows[3].__setitem__(0, "twice"), {}, ["1 rows that fit several files (twice)"]),
    "one class": (lambda rows: rows.__setitem__(slice(6, 12), []), {}, ["1 classes", "two classes or more"]),
    "column": (None, {"label_column": "labl"}, ["data.label_column=labl", "did you mean 'label'?"]),
    "split": (None, {"split_column": "label"}, ["data.split_column=label holds cat, dog", "train, val and test"]),
    "folder": (None, {"images": "nowhere"}, ["data.images=nowhere is not a folder"]),
    "no table": (None, {"labels": "nowhere.csv"}, ["data.labels=nowhere.csv cannot be read as a table"]),
    "no value": (None, {"labels": None}, ["data.labels has no value"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_rows_and_columns_that_cannot_be_used(case, pets, tmp_path):
    harm, settings, said = WRONG[case]
    for name in CLASSES:
        paint(pets / name / "twice.png", 200)
    rows = [[f"{name}{i}.png", name] for name in CLASSES for i in range(6)]
    if harm:
        harm(rows)
    pd.DataFrame(rows, columns=["image", "label"]).to_csv(tmp_path / "train.csv", index=False)
    message = refused(fresh, by_table(tmp_path, **settings))
    assert all(words in message for words in said), message
    if "rows " in said[0]:
        assert "data.on_broken=skip" in message
        wanted = Wanted("table", pets, tmp_path / "cache", on_broken="skip", labels=str(tmp_path / "train.csv"))
        found = find(wanted)
        assert len(found.labels) == (12 if case == "missing" else 11)
        assert said[0] in found.passed_over
        assert any("that the table does not name" in line for line in found.passed_over)


@pytest.mark.parametrize("columns", ["a,b,c", "image,file,label", "image,class,species", "fold,label"])
def test_columns_that_are_not_clear_are_listed(columns, pets, tmp_path):
    (tmp_path / "train.csv").write_text(f"{columns}\n1,2,3\n")
    message = refused(fresh, by_table(tmp_path))
    key, others = ("label", columns[6:]) if columns.startswith("image,c") else ("image", columns)
    assert f"data.{key}_column has no value" in message
    assert others.replace(",", ", ") in message


@pytest.mark.parametrize("form", ["kaggle", "devkit", "table"])
def test_imagenet_as_published_is_that_of_class_folders(form, tmp_path):
    """One trial, however the validation images lie."""
    wnids, labels = ["n01440764", "n01751748", "n02000000"], [2, 0, 1, 1, 0, 2]
    roots = tmp_path / "folders", tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"
    for root in roots:
        for i in range(15):
            paint(root / "train" / wnids[i % 3] / f"{i}.png", i)
        for i, c in enumerate(labels):
            paint(root / "val" / (wnids[c] if root == roots[0] else ".") / f"ILSVRC2012_val_{i:08}.png", 100 + i)
    lines = [f"ILSVRC2012_val_{i:08},{wnids[c]} 111 108 230 193 {wnids[c]} 1 1 9 9 " for i, c in enumerate(labels)]
    solution = tmp_path / "kaggle/LOC_val_solution.csv"
    solution.write_text("\n".join(["ImageId,PredictionString", *lines[::-1]]))
    if form == "devkit":
        solution.unlink()
        kit = tmp_path / "kaggle/ILSVRC2012_devkit_t12/data"
        kit.mkdir(parents=True)
        numbers = [3, 1, 2]  # the kit's own order
        rows = [(number, wnid) for number, wnid in zip(numbers, wnids, strict=True)]
        savemat(kit / "meta.mat", {"synsets": np.array(rows, [("ILSVRC2012_ID", object), ("WNID", object)])})
        truth = kit / "ILSVRC2012_validation_ground_truth.txt"
        truth.write_text("".join(f"{numbers[c]}\n" for c in labels))
    if form == "table":
        found = find(Wanted("table", roots[1] / "val", tmp_path / "cache", labels=str(solution)))
        assert [name[-5] for name in found.names] == list("142305")
        assert ([found.class_names[label] for label in found.labels]) == sorted(wnids * 2)
        return
    data, folders = (fresh(data_config(tmp_path, root=str(root))) for root in reversed(roots))
    assert (data.content, shades(data)) == (folders.content, shades(folders))
    if form == "devkit":
        truth.write_text("1\n")
        assert "meta.mat" in refused(fresh, data_config(tmp_path, root=str(roots[1])))


def pictures_in(folder: Path, names: list[str]) -> None:
    """PNGs of 8 x 8 pixels under any name; each has a grey level of its own."""
    for i, name in enumerate(names):
        paint(folder / "made.png", 10 + i)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "made.png").rename(folder / name)


def flowers(root: Path) -> dict[str, Any]:
    pictures_in(root / "flowers-102/jpg", [f"image_{i:05}.jpg" for i in range(1, 25)])
    savemat(root / "flowers-102/imagelabels.mat", {"labels": np.arange(24) % 3 + 1})
    ids = np.arange(1, 25)
    savemat(root / "flowers-102/setid.mat", {"trnid": ids[:12], "valid": ids[12:18], "tstid": ids[18:]})
    return {"_check_integrity": lambda self: True}


def textures(root: Path) -> dict[str, Any]:
    names = [f"{c}/{c}_{i}.jpg" for c in ("banded", "dotted") for i in range(9)]
    pictures_in(root / "dtd/dtd/images", names)
    (root / "dtd/dtd/labels").mkdir()
    for part, first in (("train", 0), ("val", 1), ("test", 2)):
        (root / f"dtd/dtd/labels/{part}1.txt").write_text("\n".join(names[first::3]))
    return {}


def pets_of_oxford(root: Path) -> dict[str, Any]:
    pictures_in(root / "oxford-iiit-pet/images", [f"{c}_{i}.jpg" for c in ("Bombay", "basset_hound") for i in range(9)])
    folder = root / "oxford-iiit-pet/annotations"
    folder.mkdir()
    for part, some in (("trainval", range(6)), ("test", range(6, 9))):
        (folder / f"{part}.txt").write_text(
            "\n".join(f"{c}_{i} {n} 1 1" for n, c in ((1, "Bombay"), (2, "basset_hound")) for i in some)
        )
    return {}


def satellite(root: Path) -> dict[str, Any]:
    pictures_in(root / "eurosat/2750", [f"{c}/{c}_{i}.jpg" for c in ("Forest", "River") for i in range(9)])
    return {}


def signs(root: Path) -> dict[str, Any]:
    pictures_in(root / "gtsrb/GTSRB/Training", [f"{c:05}/{i}.ppm" for c in range(2) for i in range(9)])
    pictures_in(root / "gtsrb/GTSRB/Final_Test/Images", [f"{i}.ppm" for i in range(4)])
    rows = "\n".join(f"{i}.ppm;{i % 2}" for i in range(4))
    (root / "gtsrb/GT-final_test.csv").write_text(f"Filename;ClassId\n{rows}")
    return {}


def house_numbers(root: Path) -> dict[str, Any]:
    for part, count in (("train", 20), ("test", 8)):
        images = np.random.default_rng(count).integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": images, "y": np.arange(count)[:, None] % 2 + 1})
    return {"_check_integrity": lambda self: True}


def digits(root: Path) -> dict[str, Any]:
    folder = root / "MNIST/raw"
    folder.mkdir(parents=True)
    for part, count in (("train", 20), ("t10k", 8)):
        images = np.random.default_rng(count).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        head = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = b"\0\0\x08\x01" + count.to_bytes(4, "big")
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + labels.tobytes())
    return {}


def objects(root: Path) -> dict[str, Any]:
    """Of one picture a class, torchvision hands out Pillow's, not decoded."""
    names = [f"{c}/image_{i:04}.jpg" for c in ("ant", "bass") for i in range(1, 10)]
    pictures_in(root / "caltech101/101_ObjectCategories", [*names, "BACKGROUND_Google/image_0001.jpg"])
    (root / "caltech101/Annotations").mkdir()
    return {}


LAYOUTS = {
    "Flowers102": (flowers, {"train": 12, "val": 6, "test": 6}), "DTD": (textures, {"train": 6, "val": 6, "test": 6}),
    "OxfordIIITPet": (pets_of_oxford, {"train": 12, "test": 6}), "EuroSAT": (satellite, {"train": 18}),
    "GTSRB": (signs, {"train": 18, "test": 4}), "SVHN": (house_numbers, {"train": 20, "test": 8}),
    "MNIST": (digits, {"train": 20, "test": 8}), "Caltech101": (objects, {"train": 18}),
}  # fmt: skip
SPLITS = {"OxfordIIITPet": {"train": {"split": "trainval"}}, "EuroSAT": {"train": {}}, "Caltech101": {"train": {}},
          "MNIST": {"train": {"train": True}, "test": {"train": False}}}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_set_of_torchvisions_has_its_own_parts_pictures_and_labels(name, tmp_path, monkeypatch):
    """As torchvision hands them out one by one; nothing is copied where it reads files."""
    write, sizes = LAYOUTS[name]
    (tmp_path / "data").mkdir()
    for key, value in write(tmp_path / "data").items():
        monkeypatch.setattr(getattr(torchvision.datasets, name), key, value)
    settings = {"dataset": name, "root": str(tmp_path / "data"), "val_fraction": 0.2, "test_fraction": 0.2}
    data = fresh(data_config(tmp_path, "torchvision", **settings))
    assert {part: len(ids) for part, ids in data.parts.items()} == sizes
    for part, ids in data.parts.items():
        how = SPLITS.get(name, {}).get(part, {"split": part})
        for i, (image, label) in zip(ids, getattr(torchvision.datasets, name)(tmp_path / "data", **how), strict=False):
            assert data.labels[i] == label
            np.testing.assert_array_equal(data.images[i].transpose(1, 2, 0), np.asarray(image.convert("RGB")))
    in_memory = name in ("SVHN", "MNIST")
    assert (data.digests is None) == in_memory
    assert not (tmp_path / "cache/pictures").exists()


def test_sets_that_torchvision_lacks_or_cannot_fetch(tmp_path, monkeypatch):
    for name, said in (("Flowers101", "did you mean 'Flowers102'?"), ("VOCSegment", "is unknown"), (None, "no value")):
        message = refused(fresh, data_config(tmp_path, "torchvision", dataset=name))
        assert "data.dataset" in message
        assert said in message
    monkeypatch.setattr("urllib.request.urlopen", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no net")))
    config = data_config(tmp_path, "torchvision", dataset="DTD", root=str(tmp_path))
    assert known_content(config, fetch=False) is None
    message = refused(fresh, config)
    assert f"DTD is absent from data.root={tmp_path}" in message
    assert "no net" in message
    assert all(hasattr(torchvision.datasets, name) for name in sets.SETS)


class Own:
    """Five pictures of two classes, as a Dataset hands them out: it never ends an iteration, and counts."""

    asked = 0

    def __init__(self, kind: str, folder: Path, **own: Any):
        self.kind, self.folder = kind, folder
        vars(self).update(own)

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        Own.asked += 1
        shade, label = 10 + i % 20, i % 2
        image = Image.new("RGB", (8 + i % 2, 8), (shade,) * 3)
        if self.kind == "palette":
            image = image.quantize(4)
        if self.kind in ("path", "opened"):
            image.save(path := self.folder / f"{i}.png")
            return (path if self.kind == "path" else Image.open(path)), CLASSES[label]
        grey = np.asarray(image)[..., 0]
        return {"grey": grey, "array": np.asarray(image), "float": grey / 255}.get(self.kind, image), np.int64(label)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Makes ``made:build`` return something, and gives the configuration that uses it."""
    module = type("made", (), {})
    monkeypatch.setitem(sys.modules, "made", module)
    monkeypatch.setattr(Own, "asked", 0)

    def use(returned: Any, **changes: Any) -> Any:
        module.build = (lambda: returned) if not callable(returned) else returned
        settings = {"root": None, "target": "made:build", "cache_size": 8, "val_fraction": 0.2, "test_fraction": 0.2}
        return data_config(tmp_path, "custom", **{**settings, **changes})

    return use


@pytest.mark.parametrize("kind", ["image", "palette", "array", "grey", "path", "opened"])
def test_a_dataset_of_ones_own(kind, own, tmp_path):
    config = own(Own(kind, tmp_path))
    data = fresh(config)
    assert shades(data) == list(range(10, 30))
    assert data.class_names == (CLASSES if kind in ("path", "opened") else ["0", "1"])
    assert (data.labels == np.arange(20) % 2).all()
    assert fresh(config).content == data.content
    forget()
    assert known_content(config, fetch=False) is None
    named = fresh(own({"train": Own(kind, tmp_path, classes=CLASSES), "val": Own(kind, tmp_path)}))
    assert named.class_names == CLASSES
    assert len(named.splits["val"]) == 20
    assert named.content != data.content


@pytest.mark.parametrize("nothing", [-1, None])
def test_a_part_without_labels_is_left_out_with_a_line(nothing, own, tmp_path):
    data = fresh(own({"train": Own("image", tmp_path), "test": [(Image.new("L", (8, 8)), nothing)] * 3}))
    assert [*data.parts] == ["train"]
    assert "have no labels (test)" in data.line(8)


def test_an_identity_stands_for_what_a_dataset_returns(own, tmp_path):
    content = fresh(own(Own("image", tmp_path, identity="first"))).content
    assert Own.asked == 20
    assert fresh(own(Own("grey", tmp_path, identity="first"))).content == content
    assert Own.asked == 20, "it is not asked again"
    forget()
    assert known_content(own(Own("palette", tmp_path, identity="second")), fetch=False) is None
    fresh(own(Own("image", tmp_path, identity="second")))
    assert Own.asked == 40


def test_a_dataset_is_made_with_the_root_that_is_given(own, tmp_path):
    found = fresh(own(lambda *roots: Own("image", tmp_path, classes=[str(roots), "other"]), root="/images"))
    assert found.class_names[0] == f"({Path('/images')!r},)"


def test_the_recipe_of_the_docs(tmp_path, project_root, monkeypatch):
    (text,) = re.findall("# own_data.py\n(.*?)```", (project_root / "docs/extending.md").read_text(), re.DOTALL)
    (tmp_path / "own_data.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    given = ["model=vit_tiny", "data=custom", "data.target=own_data:build", "data.cache_dir=cache", "data.batch_size=2"]
    data = load_data(api.compose(given).data)
    assert (data.class_names, data.images.shape[0]) == (["circle", "square"], 40)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: 1 / 0, ["data.target=made:build", "ZeroDivisionError"]),
        (lambda: {"training": []}, ["no part", "train"]),
        (lambda: [("nowhere.png", 0.5)], ["after 0 pictures of train", "TypeError"]),
        (lambda: [(np.zeros((8, 8, 3)), 0)] * 2, ["after 0 pictures of train", "<f8"]),
        (lambda: [(np.zeros((8, 8), np.uint8), label) for label in (0, 1, None)], ["has no label"]),
        (lambda: Own("image", Path(), classes=["one"]), ["after 1 pictures of train", "1 is not in range"]),
        (lambda: [(np.zeros((8, 8), np.uint8), 3)], ["1 classes"]),
        (lambda: [], ["0 classes"]),
    ],
)
def test_what_no_data_set_can_be_made_of(made, said, own):
    message = refused(fresh, own(made))
    assert all(words in message for words in said), message


@pytest.fixture
def hub_files(tmp_path) -> Any:
    """Writes twelve pictures in a format of the datasets library into a folder."""
    datasets = pytest.importorskip("datasets")

    def rows(pets: Path, count: int = 12) -> Any:
        paths = sorted(pets.rglob("*.png"))[:count]
        features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=CLASSES)})
        values = {"picture": [{"bytes": path.read_bytes()} for path in paths], "kind": [p.parent.name for p in paths]}
        return datasets.Dataset.from_dict(values, features=features)

    def write(kind: str, pets: Path, folder: Path) -> None:
        if kind == "saved":
            datasets.DatasetDict({"train": rows(pets), "extra": rows(pets, 3)}).save_to_disk(folder)
        elif kind == "saved alone":
            rows(pets).save_to_disk(folder)
        elif kind == "parquet":
            (folder / "data").mkdir(parents=True)
            rows(pets).to_parquet(folder / "data/train-00000-of-00001.parquet")
            rows(pets).to_parquet(folder / "data/validation-00000-of-00001.parquet")
        elif kind == "tar":
            folder.mkdir()
            with tarfile.open(folder / "train-0000.tar", "w") as tar:
                for path in sorted(pets.rglob("*.png")):
                    (path.with_suffix(".cls")).write_text(str(CLASSES.index(path.parent.name)))
                    tar.add(path, path.name)
                    tar.add(path.with_suffix(".cls"), path.with_suffix(".cls").name)

    return write


@pytest.mark.parametrize("kind", ["saved", "saved alone", "parquet", "tar"])
def test_files_of_hugging_faces(kind, pets, tmp_path, hub_files, monkeypatch):
    """Read once; what comes out are the very files that went in, one after another."""
    folders = fresh(data_config(tmp_path))
    hub_files(kind, pets, tmp_path / "set")
    config = data_config(tmp_path, "huggingface", root=str(tmp_path / "set"))
    assert known_content(config, fetch=False) is None
    data = fresh(config)
    assert shades(data)[:12] == shades(folders)
    assert data.class_names == (["0", "1"] if kind == "tar" else CLASSES)
    assert [*data.parts] == (["train", "val"] if kind == "parquet" else ["train"])
    assert (data.content == folders.content) == (kind in ("saved", "saved alone"))
    assert ("(extra)" in data.line(8)) == (kind == "saved")
    monkeypatch.setattr("lora_vit.data.huggingface._sets", None)
    assert fresh(config).content == data.content
    (tmp_path / "set" / "more.txt").write_text("another file may mean another set")
    with pytest.raises(TypeError):
        fresh(config)


def test_a_set_of_the_hub_is_fetched_once_and_its_revision_recorded(pets, tmp_path, hub_files, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked, folder = [], tmp_path / "snapshots" / ("1" * 40)
    hub_files("parquet", pets, folder)

    def download(name: str, repo_type: str, revision: str | None) -> str:
        asked.append((name, repo_type, revision))
        if len(asked) > 1:
            raise OSError(101, "no net")
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    config = data_config(tmp_path, "huggingface", root=None, dataset="org/pets:default@v1")
    data = fresh(config)
    assert fresh(config).card()["source"] == f"org/pets@{'1' * 40}"
    assert asked == [("org/pets", "dataset", "v1")]
    for name, said in (("org/pets:other", "no net"), (None, "data.dataset has no value")):
        assert said in refused(fresh, data_config(tmp_path, "huggingface", root=None, dataset=name))
    assert len(asked) == 2
    assert data.parts.keys() == {"train", "val"}


@pytest.mark.parametrize("kind", ["empty", "config", "columns"])
def test_folders_that_hold_no_such_set(kind, pets, tmp_path, hub_files):
    (tmp_path / "set").mkdir()
    settings, said = {}, ["cannot be read", "data.root"]
    if kind != "empty":
        hub_files("parquet", pets, tmp_path / "set")
        settings = {"dataset": ":other"} if kind == "config" else {"label_column": "label"}
        said = ["'other'"] if kind == "config" else ["data.label_column=label is not there", "picture, kind"]
    message = refused(fresh, data_config(tmp_path, "huggingface", root=str(tmp_path / "set"), **settings))
    assert all(words in message for words in said), message


def test_a_trial_is_known_by_its_content_not_by_its_table(pets, tmp_path, monkeypatch):
    """The settings that lead to a table are no part of a trial; those of other data sets are refused."""
    monkeypatch.chdir(tmp_path)
    table_of(pets)
    given = ["model=vit_tiny", "data=table", "data.images=pets", "data.cache_dir=cache", "data.batch_size=2"]
    first = api.compose([*given, "data.labels=train.csv"])
    assert (first.data.labels, first.data.images) == (f"{tmp_path}/train.csv", f"{tmp_path}/pets")
    table_of(pets, "tsv", file=lambda p: p.name, kind=lambda p: p.parent.name, kinds=lambda p: 7)
    again = api.compose([*given, "data.labels=train.tsv", "data.label_column=kind"])
    assert trial_id(again) == trial_id(first)
    for wrong in ("data.target=a:b", "data.dataset=DTD"):
        assert "has no effect with data=table" in refused(api.compose, [*given, "data.labels=train.csv", wrong])
    for name in DATASETS:
        assert "data.labels" in DATASETS[name].unread() or name == "table"
