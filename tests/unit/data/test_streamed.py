"""``data.cache``: where decoded images are kept, and what is known of those that are kept nowhere."""

from __future__ import annotations

import io
import itertools
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import data_config, fresh, refused
from PIL import Image, ImageOps

from lora_vit.data import cache, preprocessing
from lora_vit.data.cache import place_of
from lora_vit.data.decode import Streamed
from lora_vit.data.preprocessing import Decoding, Head, head_of
from lora_vit.data.stream import Samples

RNG = np.random.default_rng(0)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Smooth blots, as photographs have them."""
    small = RNG.integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def turned(image: Image.Image, orientation: int) -> Image.Exif:
    exif = image.getexif()
    exif[0x0112] = orientation
    return exif


@pytest.fixture
def pets(tmp_path) -> Path:
    """Two classes of twelve files of many kinds."""
    for c, name in enumerate(("cat", "dog")):
        (folder := tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(8):
            image = picture(40 + 9 * i, 70 - 5 * c)
            image.save(folder / f"{i}.jpg", progressive=bool(i % 2), exif=turned(image, 1 + i))
        picture(50, 40, "L").save(folder / "grey.jpg")
        picture(50, 40, "CMYK").save(folder / "cmyk.jpg")
        Image.merge("RGBA", [picture(30, 30, "L")] * 4).save(folder / "icon.png")
        Image.fromarray(RNG.integers(0, 65536, (40, 30), dtype=np.uint16)).save(folder / "deep.png")
    return tmp_path / "pets"


def streamed(tmp_path: Path, kept: str = "none", **changes: object):
    """The data set of ``pets``, its images kept so."""
    values = {"cache_size": 24, "value_range": [0.0, 65535.0], "cache": kept, **changes}
    return fresh(data_config(tmp_path, **values))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_become_what_pillow_makes_of_them(mode, monkeypatch):
    """To the bit, so that caches of earlier releases stay valid: sizes, samplings, scales, progressive, turned."""
    used, decode = [], preprocessing.simplejpeg.decode_jpeg
    monkeypatch.setattr(preprocessing.simplejpeg, "decode_jpeg", lambda *a, **k: used.append(k) or decode(*a, **k))
    for (width, height), sampling, progressive, how in itertools.product(
        ((64, 64), (127, 65), (33, 301), (400, 300)), (0, 1, 2), (False, True), (None, 1, 3, 5, 6, 8)
    ):
        image, file = picture(width, height, mode), io.BytesIO()
        exif = {} if how is None else {"exif": turned(image, how)}
        image.save(file, "JPEG", subsampling=sampling, progressive=progressive, **exif)
        whole = Decoding(None).read(file.getvalue())[0]
        assert head_of(file.getvalue()) == (*whole.shape[:0:-1], False, False, False)
        for size in (None, 8, 16, 20, 33, 64, 150):
            used.clear()
            found, _ = Decoding(size).read(file.getvalue())
            assert len(used) == (mode != "CMYK"), "simplejpeg has other colours for it"
            assert (preprocessing._jpeg(file.getvalue(), size) is None) == (mode == "CMYK"), "Pillow has to decode it"
            with monkeypatch.context() as without:
                without.setattr(preprocessing, "_jpeg", lambda *_: None)
                expected, _ = Decoding(size).read(file.getvalue())
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("how", ["exif", "xmp"])
def test_a_jpeg_is_turned_whatever_stands_before_the_word_of_it(how, monkeypatch):
    """Such as a preview that has pixels of its own, or segments with room between them."""
    image, file = picture(40, 20), io.BytesIO()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    image.save(file, "JPEG", **({"exif": turned(image, 6)} if how == "exif" else {"xmp": xmp}))
    whole = file.getvalue()
    width, height = ImageOps.exif_transpose(Image.open(file)).size  # an older Pillow writes and reads no XMP
    assert how == "xmp" or (width, height) == (20, 40)
    for before in (b"", b"\xff\xfe\xfd\xea" + 1000 * b"\xff\xda" + 63_000 * b"-", b"\xff\xff\xff\xfe\x00\x03-\xff\xff"):
        content = whole[:2] + before + whole[2:]
        assert head_of(content) == (width, height, False, False, False)
        assert Decoding(None).read(content)[0].shape == (3, height, width)


def test_streamed_images_are_those_of_a_cache(pets, tmp_path):
    """Of all kinds of files; and each is told of, as far as headers show it."""
    kept, held, none = (streamed(tmp_path, where) for where in ("disk", "memory", "none"))
    assert [type(data.images) for data in (kept, held, none)] == [np.memmap, np.ndarray, Streamed]
    ids = RNG.permutation(24)
    for data in (held, none):
        np.testing.assert_array_equal(data.images[ids], kept.images[ids])
        assert (data.images.shape, data.decoding) == (kept.images.shape, kept.decoding)
    assert "; 2 files with more than 8 bits; 2 files with transparent pixels" in kept.line(24)
    assert "; decoded when needed (0.0 GiB decoded, " in none.line(24)
    assert "; 2 files with an alpha channel; 2 files with more than 8 bits" in none.line(24)
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 1
    assert kept.fingerprint == none.fingerprint


@pytest.mark.parametrize(("needed", "memory", "disk", "can", "place"), [
    (10, 40, 20, True, "disk"), (11, 40, 99, True, "none"), (10, 99, 19, True, "none"), (11, 40, 99, False, "disk"),
])  # fmt: skip
def test_auto_keeps_what_a_quarter_of_the_memory_and_half_of_the_disk_hold(needed, memory, disk, can, place):
    assert place_of("auto", needed, memory, disk, can) == place
    assert {place_of(asked, needed, memory, disk, can) for asked in ("none", "memory")} == {"none", "memory"}


def test_auto_by_what_is_free(pets, tmp_path, monkeypatch):
    """A cache that is there is used, whatever is free; deep files without a range are looked through on a disk."""
    monkeypatch.setattr(cache, "_DISK_SHARE", 0)
    assert isinstance(streamed(tmp_path, "auto").images, Streamed)
    assert isinstance(streamed(tmp_path, "auto", value_range=None).images, np.memmap)
    streamed(tmp_path, "disk")
    assert isinstance(streamed(tmp_path, "auto").images, np.memmap)
    monkeypatch.setattr(cache.psutil, "virtual_memory", lambda: type("free", (), {"available": 5}))
    assert "data.cache=memory: 0.0 GiB decoded, " in refused(streamed, tmp_path, "memory")


def test_what_headers_show_is_refused_before_anything_is_decoded(pets, tmp_path):
    """In the words of a cache's build; what they do not show, where it is met."""
    message = refused(streamed, tmp_path, value_range=None)
    assert f"data.cache=none: 2 of 24 images below {pets} have more than 8 bits: give data.value_range=" in message
    said = [refused(streamed, tmp_path, kept, cache_size=None) for kept in ("none", "disk")]
    assert said[0] == said[1]
    assert "give data.cache_size to bring all to one size" in said[0]
    (pets / "cat" / "9.jpg").write_bytes(b"hello")
    said = [refused(streamed, tmp_path, kept) for kept in ("none", "disk")]
    assert said[0] == said[1]
    assert "1 broken image below " in said[0]
    (pets / "cat" / "9.jpg").write_bytes((pets / "cat" / "7.jpg").read_bytes()[:900])
    samples = Samples(streamed(tmp_path), torch.device("cpu"))
    at = next(i for i, name in enumerate(samples.data.names) if name == "cat/9.jpg")
    _, gathered = samples.read(np.array([at - 1, at, at + 1]))
    message = refused(gathered)
    assert f"{pets}/cat/9.jpg cannot be decoded (" in message
    assert "repair or remove it; data.cache=disk finds" in message
    (pets / "cat" / "0.jpg").write_bytes((pets / "cat" / "1.jpg").read_bytes())
    assert "0.jpg cannot be decoded (it changed after" in refused(samples.gather, np.array([0]))


def test_batches_are_decoded_before_they_are_asked_for(pets, tmp_path, monkeypatch):
    """On a CPU too."""
    samples, seen, read = Samples(streamed(tmp_path), torch.device("cpu")), [], Decoding.read
    monkeypatch.setattr(Decoding, "read", lambda *a, **k: seen.append(threading.current_thread()) or read(*a, **k))
    waiting = [samples.read(ids)[1] for ids in np.arange(24).reshape(3, 8)]
    samples._readers.shutdown()
    assert len(seen) == 24
    assert threading.current_thread() not in seen
    images = torch.cat([gathered()[0] for gathered in waiting])
    np.testing.assert_array_equal(images.numpy(), streamed(tmp_path, "disk").images[:])


def test_threads_that_read_crosswise_leave_the_filters_of_warnings_as_they_were(pets):
    content, before = (pets / "cat" / "icon.png").read_bytes(), warnings.filters[:]
    first, second = preprocessing._opened(content), preprocessing._opened(content)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    warnings.warn("odd metadata", stacklevel=1)
    second.__exit__(None, None, None)
    assert warnings.filters == before


@pytest.mark.parametrize("name", ["a.gif", "b.tif", "c.webp", "d.png", "e.mpo"])
def test_heads_of_files_with_several_pictures(name, tmp_path):
    first, second = picture(20, 10), picture(20, 10)
    first.save(tmp_path / name, save_all=True, append_images=[second])
    head = np.array(head_of((tmp_path / name).read_bytes()), Head)
    assert (head["width"], head["height"], head[preprocessing.SEVERAL]) == (20, 10, name != "e.mpo")
    assert head_of(b"no picture") == (0, 0, False, False, False)
