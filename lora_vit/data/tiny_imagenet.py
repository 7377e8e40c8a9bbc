"""Tiny-ImageNet (Stanford CS231n): 200 classes, 500 training images of 64x64 pixels each.

These are divided, for their labels are sure; its own val folder is an optional further test set.
"""

import http.client
import os
import tempfile
import urllib.error
import zipfile
import zlib
from pathlib import Path

from lora_vit.data.cache import found_in
from lora_vit.data.dataset import Found, Wanted
from lora_vit.data.files import Listing, digests_of, locked_in
from lora_vit.errors import ConfigError, one_line
from lora_vit.terminal import Progress

FOLDER = "tiny-imagenet-200"
URL = f"http://cs231n.stanford.edu/{FOLDER}.zip"
MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


def find(wanted: Wanted) -> Found | None:
    """The data set at ``root`` (folder or zip), downloaded if it is absent. Raises ConfigError where it is damaged."""
    if (folder := _folder(wanted)) is None:
        return None
    files = Listing(wanted.cache_dir)
    wnids = _lines(folder / "wnids.txt")
    if len(set(wnids)) != len(wnids) or len(wnids) < 2:
        raise ConfigError(f"{folder / 'wnids.txt'} must name two or more different classes: extract the archive again")
    for name in files.folders(folder / "train"):
        if name not in wnids:
            files.skip("folders of train/ that wnids.txt does not name", name)
    images = []
    for label, wnid in enumerate(wnids):
        place = f"train/{wnid}/images"
        if not (found := files.images(folder, place) if (folder / place).is_dir() else []):
            raise ConfigError(f"class {wnid} of wnids.txt has no images in {folder / place}: extract the archive again")
        images += [(name, label) for name in found]
    parts = {"train": images}
    if wanted.official_val:
        parts["official_val"] = _official_val(folder, wnids, files)
    rows = [line.partition("\t") for line in _lines(folder / "words.txt")] if (folder / "words.txt").is_file() else []
    words = {wnid: text.split(",")[0].strip() for wnid, _, text in rows}
    names = [words.get(wnid) or wnid for wnid in wnids]  # the first of a class's words, then with wnid if two share it
    class_names = [n if names.count(n) == 1 else f"{n} ({wnid})" for n, wnid in zip(names, wnids, strict=True)]
    return found_in(folder, class_names, parts, files, wanted)


def _folder(wanted: Wanted) -> Path | None:
    """The unpacked data set: ``root`` or a folder in it (so Kaggle mounts it), from a zip there, or downloaded."""
    root, target = wanted.root, wanted.root / FOLDER
    is_there = target.exists()  # asked first: another process may be making it
    if whole := _whole_in(root):
        return whole
    if is_there:
        raise ConfigError(f"{target} lacks wnids.txt or train/: unpack {FOLDER}.zip again, or give another data.root")
    if root.suffix == ".zip" and not root.exists():
        raise ConfigError(f"data.root={root} does not exist: give a zip, or a folder to download to")
    zips = [root] if root.is_file() else sorted(root.glob(f"{FOLDER}*.zip"), key=lambda path: len(path.name))
    if len(zips) > 1 and zips[0].stem != FOLDER:
        raise ConfigError(f"{root} holds {', '.join(p.name for p in zips)}: give one of them as data.root")
    archive = zips[0] if zips else None
    if archive is not None:  # its folder may be read-only, and another zip may take its place
        digest = digests_of(archive.parent, [archive.name], wanted.cache_dir, wanted.fetch)
        if digest is None:
            return None
        target = wanted.cache_dir / f"{FOLDER}-{digest.tobytes().hex()[:16]}"
    if not target.exists():
        if not wanted.fetch:
            return None
        with locked_in(wanted.cache_dir, f"tiny-imagenet {target.resolve()}"):  # several processes of one run come here
            if not target.exists():
                _make(target, archive, wanted)
    return target


def _whole_in(root: Path) -> Path | None:
    """The folder, or the one in it, that has the list of classes and their images. Raises ConfigError for several."""
    for folders in ([root], [root / FOLDER], sorted(root.glob("*"))):
        whole = [folder for folder in folders if (folder / "wnids.txt").is_file() and (folder / "train").is_dir()]
        if len(whole) > 1:
            raise ConfigError(f"{root} holds {', '.join(f.name for f in whole)}: give one of them as data.root")
        if whole:
            return whole[0]
    return None


def _make(target: Path, archive: Path | None, wanted: Wanted) -> None:
    """Unpack a zip (None: the published one) beside ``target`` and move it into place: it is whole or absent."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            archive = archive or _download(Path(temporary), wanted.root)
            into = Path(temporary, FOLDER)
            what = f"unpacking {archive.name}"
            with zipfile.ZipFile(archive) as z, Progress(what, len(z.infolist()), unit="files") as bar:
                for member in z.infolist():  # no name makes zipfile write outside the folder, and it makes no links
                    z.extract(member, into)
                    bar.advance(1)
            if (whole := _whole_in(into)) is None:
                raise ConfigError(f"{archive} holds no wnids.txt and train/: it is not Tiny-ImageNet")
            os.replace(whole, target)
    except (zipfile.BadZipFile, EOFError, zlib.error, RuntimeError) as error:  # cut off, altered, encrypted, ...
        what = f"{archive} is damaged ({one_line(error)})"
        raise ConfigError(f"{what}: get it again, or give another data.root") from None
    except OSError as error:
        what = f"{error.filename or target} cannot be read or written ({error.strerror or error})"
        raise ConfigError(f"{what}: give another data.root or data.cache_dir") from None


def _download(folder: Path, root: Path) -> Path:
    from torchvision.datasets.utils import download_url

    try:
        download_url(URL, folder, f"{FOLDER}.zip", MD5)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        lacks = f"Tiny-ImageNet is not below data.root={root} and {URL} cannot be downloaded ({one_line(error)})"
        put = f"put {FOLDER}.zip or {FOLDER}/ into {root.resolve()}"
        raise ConfigError(f"{lacks}: {put}, or run experiment=quickstart, which needs no download") from None
    return folder / f"{FOLDER}.zip"


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    return [line.strip() for line in text.splitlines() if line.strip()]


def _official_val(folder: Path, wnids: list[str], files: Listing) -> list[tuple[str, int]]:
    annotations, images = folder / "val" / "val_annotations.txt", folder / "val" / "images"
    if not annotations.is_file():
        raise ConfigError(f"data.official_val=true, but there is no {annotations}: extract the archive again")
    rows = sorted([*line.split("\t"), ""][:2] for line in _lines(annotations))
    named = [(f"val/images/{name}", wnids.index(wnid)) for name, wnid in rows if wnid in wnids]
    there = files.images(folder, "val/images") if images.is_dir() else []
    missing = {name for name, _ in named} - set(there)
    if missing or not named:
        lacks = f"{annotations} names {len(named)} images of known classes, {images} lacks {len(missing)} of them"
        raise ConfigError(f"{lacks}: extract the archive again")
    for name in sorted(set(there) - {name for name, _ in named}):
        files.skip(f"of val/images without a class in {annotations.name}", name)
    return named
