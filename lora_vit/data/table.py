"""Images whose labels stand in a table, a row for each: CSV, TSV, Parquet or JSON lines."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from lora_vit.config.rules import nearest, refuse
from lora_vit.data.dataset import Found, Wanted
from lora_vit.data.files import Listing
from lora_vit.data.items import listed
from lora_vit.errors import ConfigError, one_line
from lora_vit.files import shown, user_path

# What a column is called, in small letters without signs; later names count where there is none of the first.
_LIKE = {
    "image": ("(image|img|file|picture|photo)s?(id|name|path)?|path|idcode|isicid|jpe?g|png|webp", "id|name"),
    "label": ("labels?|class(name|id)?|cls|target|category(id|name)?|species|breed|diagnosis|dx|predictionstring",),
    "split": ("split|subset|partition",),
}
PARTS = {"train": "train(ing)?", "val": "val(id(ation)?)?|dev", "test": "test(ing)?"}
_DIVIDES = re.compile("(k_?)?folds?|is_?(train|val|valid|test)", re.I)


def find(wanted: Wanted) -> Found | None:
    """The images that ``labels`` names, below ``root``. Raises ConfigError where columns or rows are not clear."""
    path, root, files = user_path(wanted.labels or ""), wanted.root, Listing(wanted.cache_dir)
    if not root.is_dir():
        raise ConfigError(f"data.images={shown(root)} is not a folder: give the one with the images of {shown(path)}")
    table = _read(path)
    columns = [str(name) for name in table if not str(name).startswith("Unnamed: ")]  # of a written index
    image = column("image", wanted.image_column, columns, shown(path))
    label = column("label", wanted.label_column, [name for name in columns if name != image], shown(path))
    split = column("split", wanted.split_column, columns, shown(path))
    for name in filter(_DIVIDES.fullmatch, [] if split else columns):
        files.skip("columns that would divide the images otherwise", name)
    rows = table[[image, label]].set_axis(["given", "label"], axis="columns")
    rows["part"] = table[split].map(part_of) if split else "train"
    if (unknown := rows["part"].isna()).any():
        values = ", ".join(sorted({value or "nothing" for value in table[split][unknown]})[:3])
        refuse("data.split_column", split, f"holds {values} in {shown(path)}: give a column of train, val and test")
    rows["group"] = table[wanted.group] if wanted.group in columns else ""
    if label.lower() == "predictionstring":  # of ILSVRC: the class, then boxes
        rows["label"] = rows["label"].str.split().str[0].fillna("")
    names = files.images(root, "")
    own = os.path.relpath(path, root)
    files.passed = {why: left for why, of in files.passed.items() if (left := [name for name in of if name != own])}
    rows["name"] = rows["given"].map(_places(rows["given"], root, names))
    different = rows.drop_duplicates(["name", "label", "part"])["name"]
    bad = {
        "rows without a file's name": rows["given"] == "",
        "rows without label": rows["label"] == "",
        "rows of files that are not there, or no images": rows["name"].isna(),
        "rows that fit several files": rows["name"] == "",
        "rows of files with several labels or parts": rows["name"].isin(different[different.duplicated()]),
    }
    rows["wrong"] = np.select([*bad.values()], [*bad], "")
    said = rows["given"].where(rows["given"] != "", [f"row {row + 2}" for row in rows.index])
    wrong = {why: [*said[rows["wrong"] == why]] for why in bad if (rows["wrong"] == why).any()}
    rows = rows[rows["wrong"] == ""]
    if wrong and wanted.on_broken != "skip":
        lacks = ", ".join(Listing(wanted.cache_dir, wrong).lines())
        raise ConfigError(f"{shown(path)} has {lacks}: repair it, or leave them out by data.on_broken=skip")
    files.passed |= wrong
    for given in rows["given"][rows.duplicated("name")]:
        files.skip("rows again", given)
    rows = rows.drop_duplicates("name")
    for name in sorted({*names} - {*rows["name"]}):
        files.skip("images that the table does not name", name)
    rows = rows.sort_values(["label", "name"])  # as class folders are listed: the same images are the same data set
    rows = rows.sort_values("part", key=lambda parts: parts.map([*PARTS].index), kind="stable")
    found = listed(root, [*zip(rows["part"], rows["name"], rows["label"], strict=True)], None, files, wanted)
    return found and replace(found, groups=rows["group"].to_numpy() if wanted.group in columns else None)


def column(what: str, given: str | None, columns: Sequence[str], place: str) -> str:
    """The column that is ``given`` by data.``what``_column, or whose name says that it holds images, labels or splits.

    Empty where there is none of splits. Raises ConfigError, with the columns of ``place``.
    """
    key, has = f"data.{what}_column", f"{place} has the columns {', '.join(columns)}"
    if len(columns) == 1 and what != "split":
        return columns[0]
    if given is not None:
        return given if given in columns else refuse(key, given, f"is not there{nearest(given, columns)}: {has}")
    for names in _LIKE[what]:
        found = [name for name in columns if re.fullmatch(names, re.sub(r"[\W_]", "", name).lower())]
        if len(found) == 1:
            return found[0]
        if found:
            break
        if what == "split":
            return ""
    raise ConfigError(f"{has}: say with {key} which holds the {what} of each")


def part_of(split: str) -> str | None:
    """``train``, ``val`` or ``test`` by another's word for it."""
    return next((part for part, called in PARTS.items() if re.fullmatch(called, split, re.I)), None)


def _places(values: Iterable[str], root: Path, names: list[str]) -> dict[str, str]:
    """The image that each value of a column means; empty where several are so called.

    A path below ``root``, or from a folder of its name; without a folder one further down too; or such without ending.
    """
    found: dict[str, str] = {}
    for low in (False, True):
        for form in (str, lambda name: os.path.splitext(name)[0]):
            if left := {*values} - {*found, ""}:
                places: dict[str, str] = {}
                for name in names:
                    key = form(os.path.basename(name) if low else name)
                    places[key] = "" if key in places else name
                for value in left:
                    path = os.path.normpath(os.path.relpath(value, root) if os.path.isabs(value) else value)
                    for key in {path, path.removeprefix(f"{root.name}/")} & places.keys():
                        found[value] = places[key]
    return found


def _read(path: Path) -> Any:
    """The table as a data frame of texts; what lacks is empty. Raises ConfigError."""
    import pandas as pd

    try:
        if (kind := path.suffix.lower()) in (".parquet", ".pq"):
            table = pd.read_parquet(path)
        elif kind in (".json", ".jsonl", ".ndjson"):
            table = pd.read_json(path, lines=kind != ".json", dtype=False, convert_dates=False)
        else:
            with path.open(encoding="utf-8-sig") as file:
                first = file.readline()
            sign = max(",;\t", key=first.count)
            table = pd.read_csv(path, sep=sign, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ImportError as error:
        needs = f"data.labels={shown(path)} needs pyarrow ({one_line(error)})"
        raise ConfigError(f"{needs}: pip install 'lora_vit[datasets]'") from None
    except (OSError, ValueError) as error:
        what = f"data.labels={shown(path)} cannot be read as a table ({one_line(error)})"
        raise ConfigError(f"{what}: give CSV, TSV, Parquet or JSON lines") from None
    texts = table.convert_dtypes().astype("string").fillna("")  # whole numbers without fraction, beside gaps too
    return texts.astype(object).apply(lambda values: values.str.strip())
