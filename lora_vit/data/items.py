"""Pictures and labels that other code hands out one by one, as the files of a data set."""

import hashlib
import io
import json
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from lora_vit.data.cache import found_in
from lora_vit.data.dataset import Found, Wanted
from lora_vit.data.files import Listing, locked_in
from lora_vit.errors import ConfigError, one_line
from lora_vit.files import write_json
from lora_vit.terminal import Progress

Row = tuple[str, str, Any]  # part, path, and label: a name, or a number where the classes have names, or None
# What has pairs of picture and label, for each part; the names of the classes, or None; where it came from, or None.
Sets = tuple[Mapping[str, Iterable[tuple[Any, Any]]], Sequence[str] | None, str | None]


def found_from(make: Callable[[], Sets], wanted: Wanted, identity: str | None = None) -> Found | None:
    """The data set of what ``make`` gives, or None: something is not known yet, and not to be read.

    A picture is a path, a file's bytes, Pillow's image or an array, uint8 [h, w] or [h, w, 3]. What is no file is kept
    as one below the cache's folder. With an ``identity`` it is asked for once. Raises ConfigError.
    """
    index = wanted.cache_dir / f"items-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}.json"
    with locked_in(wanted.cache_dir, index.name):  # several processes of one run come here
        if identity and index.is_file():
            rows, class_names, source = json.loads(index.read_text())
        elif identity and not wanted.fetch:
            return None
        else:
            rows, (sets, class_names, source) = [], make()
            with Progress("reading pictures", 0, quiet=not identity) as bar:
                for part, picture, label in _pairs(sets, class_names):
                    if isinstance(picture, bytes) and not wanted.fetch:
                        return None
                    rows.append((part, _kept(picture, wanted.cache_dir / "pictures"), label))
                    bar.total += 1
                    bar.advance(1)
            if identity:
                write_json(index, [rows, class_names, source])
    root = Path(os.path.commonpath([os.path.dirname(path) for _, path, _ in rows]))
    rows = [(part, os.path.relpath(path, root), label) for part, path, label in rows]
    found = listed(root, rows, class_names, Listing(wanted.cache_dir), wanted)
    return found and replace(found, source=source)


def listed(root: Path, rows: Sequence[Row], class_names: Sequence[str] | None, files: Listing, wanted: Wanted
           ) -> Found | None:  # fmt: skip
    """The data set of images below ``root``. Raises ConfigError where they are not train and two classes or more."""
    kept = [part for part in ("train", "val", "test") if any(of == part and label is not None for of, _, label in rows)]
    for part in sorted({part for part, _, _ in rows}.difference(kept)):
        files.skip("parts that are neither train, val nor test, or have no labels", part)
    rows = [row for row in rows if row[0] in kept]
    called = {label for _, _, label in rows if label is not None}
    names = class_names or sorted(called, key=lambda text: (text.zfill(9) if text.isdecimal() else text, text))
    numbers = {name: number for number, name in enumerate(names)}
    parts: dict[str, list[tuple[str, int]]] = {part: [] for part in kept}
    for part, path, label in rows:
        if label is None:
            raise ConfigError(f"{path} of {part} has no label: give one, or leave it out")
        parts[part].append((path, label if isinstance(label, int) else numbers[label]))
    if len(names) < 2 or "train" not in kept:
        has = f"data={wanted.name} has {len(names)} classes, and images of {', '.join(kept) or 'no part'}"
        raise ConfigError(f"{has}: a classifier needs two classes or more, and images of train")
    return found_in(root, list(names), parts, files, wanted)


def _pairs(sets: Mapping[str, Any], class_names: Sequence[str] | None) -> Iterator[tuple[str, Any, Any]]:
    """Part, picture (its path or a file's bytes) and label of each. Raises ConfigError for what is no such pair."""
    for part, pairs in sets.items():
        # asked for its length, as torch's samplers do: a Dataset need not end an iteration
        each = map(pairs.__getitem__, range(len(pairs))) if hasattr(pairs, "__len__") else pairs
        count = 0
        try:
            for picture, label in each:
                if not isinstance(label, str | None):
                    number, known = operator.index(label), range(len(class_names or ()))
                    label = None if number == -1 else known.index(number) if class_names else str(number)
                yield part, _file(picture), label
                count += 1
        except Exception as error:  # anything, of code of one's own
            wants = "give pairs of a picture (a path, Pillow's image, an array of uint8) and a label"
            raise ConfigError(f"after {count:,} pictures of {part}: {one_line(error)}: {wants}") from None


def _file(picture: Any) -> str | bytes:
    """A picture's path, or its bytes as a file: a plain TIFF, the same from every version of a library."""
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, str | os.PathLike | Image.Image):
        picture = Image.fromarray(np.asarray(picture))
    if getattr(picture, "tile", ()):  # Pillow's, not decoded yet
        picture = getattr(picture, "filename", "") or picture
    if not isinstance(picture, Image.Image):
        return os.path.abspath(picture)
    buffer, upright = io.BytesIO(), ImageOps.exif_transpose(picture)
    (upright.convert("RGBA") if upright.mode in ("P", "PA") else upright).save(buffer, "tiff")
    return buffer.getvalue()


def _kept(picture: str | bytes, folder: Path) -> str:
    """The path of a picture that is a file, or becomes one by its content."""
    if isinstance(picture, str):
        return picture
    path = folder / (name := hashlib.sha256(picture).hexdigest())[:2] / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".partial").write_bytes(picture)
        path.with_suffix(".partial").replace(path)
    return str(path)
