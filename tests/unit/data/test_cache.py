"""The decoded cache: what a file becomes, who builds it, and how a build may end."""

from __future__ import annotations

import dataclasses
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import decoded, is_running
from PIL import Image

from lora_vit.data import cache
from lora_vit.data.cache import decode
from lora_vit.data.files import digests_of
from lora_vit.errors import ConfigError


@pytest.fixture
def pictures(tmp_path) -> tuple[Path, list[str]]:
    """Three hundred small JPEG files; 40 pixels wide, 24 high."""
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    names = [f"{i:03d}.jpg" for i in range(300)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(root / name)
    return root, names


@pytest.fixture
def two_workers(monkeypatch) -> None:
    """Even few bytes are worth a worker, and there are two cores."""
    monkeypatch.setattr(cache, "_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(cache, "cores", lambda: 2)


def folder_of(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def left_in(tmp_path: Path) -> set[str]:
    """Endings of what lies in the cache, but for the files' digests and locks."""
    return {path.suffix for path in (tmp_path / "cache").iterdir()} - {".npz", ".lock"}


@pytest.mark.parametrize("size", [None, 16])
def test_workers_fill_every_row(size, pictures, two_workers, tmp_path):
    root, names = pictures
    images = decoded(root, names, size, folder_of(tmp_path), True)
    assert images.shape == (300, 3, *((24, 40) if size is None else (size, size)))
    for i in (0, 1, 63, 64, 255, 299):
        np.testing.assert_array_equal(images[i], decode(root / names[i], size))
    # and none of the others is another's
    assert len({row.tobytes() for row in images}) == 300


def test_workers_and_this_process_decode_alike(pictures, tmp_path, monkeypatch):
    root, names = pictures
    alone = decoded(root, names, 20, str(tmp_path / "one"), True)
    monkeypatch.setattr(cache, "_BYTES_PER_WORKER", 1)
    monkeypatch.setattr(cache, "cores", lambda: 3)
    np.testing.assert_array_equal(decoded(root, names, 20, str(tmp_path / "other"), True), alone)


def test_every_broken_file_is_named_up_to_twenty(pictures, two_workers, tmp_path):
    root, names = pictures
    for name in names[10:35]:
        (root / name).write_bytes((root / name).read_bytes()[:200])
    with pytest.raises(ConfigError) as error:
        decoded(root, names, None, folder_of(tmp_path), True)
    message = str(error.value)
    assert all(name in message for name in names[10:30])
    assert "25 broken images" in message
    assert "and 5 more" in message
    assert names[30] not in message
    assert left_in(tmp_path) == set()


def test_a_worker_that_dies_ends_the_build(pictures, two_workers, tmp_path, monkeypatch):
    root, names = pictures
    started = cache._Worker.__init__

    def start_and_kill(self, job):
        started(self, job)
        os.kill(self._process.pid, signal.SIGKILL)

    monkeypatch.setattr(cache._Worker, "__init__", start_and_kill)
    with pytest.raises(ConfigError, match=r"ended with code -9 .*memory"):
        decoded(root, names, None, folder_of(tmp_path), True)
    assert left_in(tmp_path) == set()


def test_a_full_disk_is_an_error_of_one_line(pictures, two_workers, tmp_path, monkeypatch):
    """/dev/full takes the place of the partial file: every write to it fails as on a full disk."""
    root, names = pictures
    run = cache._run

    def on_full_disk(job, names, digests, quiet):
        return run(dataclasses.replace(job, out="/dev/full"), names, digests, quiet)

    monkeypatch.setattr(cache, "_run", on_full_disk)
    with pytest.raises(ConfigError, match="No space left") as error:
        decoded(root, names, None, folder_of(tmp_path), True)
    assert "data.cache_dir" in str(error.value)
    assert "\n" not in str(error.value)
    assert left_in(tmp_path) == set()


def test_an_unwritable_cache_dir(pictures, tmp_path):
    root, names = pictures
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match=r"data\.cache_dir"):
        decoded(root, names, None, str(tmp_path / "file" / "cache"), True)


def test_a_damaged_cache_is_made_anew(pictures, tmp_path):
    root, names = pictures
    whole = np.array(decoded(root, names, None, folder_of(tmp_path), True))
    (path,) = (tmp_path / "cache").glob("*.npy")
    path.write_bytes(path.read_bytes()[:5000])
    np.testing.assert_array_equal(decoded(root, names, None, folder_of(tmp_path), True), whole)


@pytest.mark.parametrize("harm", ["header", "range gone", "range cut", "range of another kind"])
def test_a_cache_of_deep_images_that_is_damaged_in_part_is_made_anew(harm, tmp_path):
    """Without its range the images would pass for 8-bit ones, and predict would refuse their like."""
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "a.png")
    place = tmp_path / "cache"
    digests = digests_of(tmp_path, ["a.png"], place, True)
    for _ in range(2):
        images, *beside_them = cache.decoded(tmp_path, ["a.png"], digests, None, place, True)
        assert (images[0, 0].tolist(), beside_them) == ([[0, 255]], [(0.0, 4095.0), 0])
        (array,), (beside,) = place.glob("*.npy"), place.glob("*.json")
        if harm == "header":
            array.write_bytes(array.read_bytes().replace(b"False", b"Fals{"))
        elif harm == "range gone":
            beside.unlink()
        else:
            beside.write_text("[1.0" if harm == "range cut" else "{}")


def test_files_with_several_pictures_are_counted_and_the_first_is_used(tmp_path):
    """A photo with a preview of itself (MPO) is one picture."""
    shades = [Image.new("L", (2, 1), shade) for shade in (10, 200)]
    for name in ("a.gif", "b.tif", "c.webp", "d.png", "e.mpo"):
        shades[0].save(tmp_path / name, save_all=True, append_images=shades[1:])
    shades[0].save(tmp_path / "f.tif")
    whole = (tmp_path / "b.tif").read_bytes()
    (tmp_path / "g.tif").write_bytes(whole[: len(whole) // 2 + 20])  # cut in its second page
    names = sorted(path.name for path in tmp_path.iterdir())
    digests = digests_of(tmp_path, names, tmp_path / "cache", True)
    for _ in range(2):
        images, _, more = cache.decoded(tmp_path, names, digests, None, tmp_path / "cache", True)
        assert (abs(images.astype(int) - 10) <= 2).all()
        assert more == 5


def test_a_file_in_the_place_of_the_cache_is_not_taken_for_it(pictures, tmp_path):
    root, names = pictures
    whole = np.array(decoded(root, names, None, folder_of(tmp_path), True))
    (path,) = (tmp_path / "cache").glob("*.npy")
    for wrong in (whole[:-1], whole.astype(np.float32)):
        np.save(path, wrong)
        np.testing.assert_array_equal(decoded(root, names, None, folder_of(tmp_path), True), whole)


def test_a_file_changed_to_another_of_the_same_size_is_decoded_again(tmp_path):
    path = tmp_path / "a.bmp"
    for shade in (10, 20):
        Image.new("RGB", (4, 4), (shade, shade, shade)).save(path)
        os.utime(path, ns=(0, shade))
        assert (decoded(tmp_path, ["a.bmp"], None, folder_of(tmp_path), True) == shade).all()


def test_a_moved_folder_finds_its_cache(pictures, tmp_path, monkeypatch):
    root, names = pictures
    first = np.array(decoded(root, names, None, folder_of(tmp_path), True))
    root.rename(tmp_path / "elsewhere")
    monkeypatch.setattr(cache, "_build", lambda *args: pytest.fail("decoded again"))
    np.testing.assert_array_equal(decoded(tmp_path / "elsewhere", names, None, folder_of(tmp_path), True), first)


def test_another_size_is_another_cache(pictures, tmp_path):
    root, names = pictures
    assert decoded(root, names, 16, folder_of(tmp_path), True).shape[-1] == 16
    assert decoded(root, names, 20, folder_of(tmp_path), True).shape[-1] == 20


def test_a_read_only_map(pictures, tmp_path):
    root, names = pictures
    images = decoded(root, names, None, folder_of(tmp_path), True)
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


BUILD = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from pathlib import Path
from lora_vit.data import cache
from lora_vit.data.files import digests_of
build = cache._build
def counted(*args):
    print("built", flush=True)
    return build(*args)
cache._build = counted
root = Path(sys.argv[1])
names, place = sorted(p.name for p in root.iterdir()), Path(sys.argv[2])
cache.decoded(root, names, digests_of(root, names, place, True), None, place, True)
"""
# A script without ``if __name__ == "__main__"``, as a user of the library may write.


def test_runs_that_start_together_build_once(pictures, tmp_path, project_root):
    root, _ = pictures
    command = [sys.executable, "-c", BUILD, str(root), folder_of(tmp_path)]
    runs = [subprocess.Popen(command, cwd=project_root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    output = "".join(run.communicate(timeout=60)[0] for run in runs)
    assert [run.returncode for run in runs] == [0, 0, 0]
    assert output.count("built") == 1


SLOW_BUILD = BUILD.replace(
    "build = cache._build", "cache._BYTES_PER_WORKER = 1; cache._CHUNK = 1; build = cache._build"
)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_build_leaves_no_cache_and_no_processes(how, pictures, tmp_path, project_root):
    """Enough large images that the build cannot be over before the signal; then a second run makes it whole."""
    root, _ = pictures
    rng = np.random.default_rng(1)
    large = Image.fromarray(rng.integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    for path in root.iterdir():
        path.unlink()
    large.save(root / "000.png")
    for i in range(1, 40):
        os.link(root / "000.png", root / f"{i:03d}.png")
    command = [sys.executable, "-c", SLOW_BUILD, str(root), folder_of(tmp_path)]
    run = subprocess.Popen(command, cwd=project_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None
    assert run.stdout.readline() == "built\n"
    deadline = time.monotonic() + 20
    while not (workers := children(run.pid)) and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert workers
    run.send_signal(how)
    run.communicate(timeout=30)
    assert run.returncode != 0
    assert not list((tmp_path / "cache").glob("*.npy"))
    if how == signal.SIGINT:
        assert left_in(tmp_path) == set()
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(is_running(pid) for pid in workers)
    names = sorted(p.name for p in root.iterdir())[:3]
    assert decoded(root, names, 8, folder_of(tmp_path), True).shape == (3, 3, 8, 8)


def children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    if not path.exists():
        pytest.skip("needs Linux's /proc")
    return [int(child) for child in path.read_text().split()]


# ---- one file


def test_short_side_is_resized_and_the_centre_kept(tmp_path):
    """Three vertical bands, the middle one as wide as the picture is high: only that is left."""
    pixels = np.zeros((40, 120, 3), np.uint8)
    pixels[:, :40, 0], pixels[:, 40:80, 1], pixels[:, 80:, 2] = 255, 255, 255
    Image.fromarray(pixels).save(tmp_path / "bands.png")
    image = decode(tmp_path / "bands.png", 20)
    assert image.shape == (3, 20, 20)
    # the outermost pixels lie on the border of two bands and mix them a little
    assert image[1, :, 1:-1].min() == 255
    assert image[[0, 2], :, 1:-1].max() == 0
    assert image[1].min() > 200


def test_resizing_is_antialiased(tmp_path):
    """A chequerboard of single pixels becomes grey; taking every eighth pixel would give black or white."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "board.png")
    inner = decode(tmp_path / "board.png", 8)[:, 2:-2, 2:-2].astype(int)
    assert abs(inner - 127).max() <= 4


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp", "gif", "tif", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats(ending, mode, tmp_path):
    """A smooth picture, so that lossy formats stay near it."""
    ramp = np.linspace(40, 200, 32).astype(np.uint8)
    grey = np.broadcast_to(ramp, (32, 32))
    pixels = grey if mode == "L" else np.stack([grey, grey.T, grey[:, ::-1]], -1)
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"a.{ending}")
    image = decode(tmp_path / f"a.{ending}", None)
    expected = np.stack([pixels] * 3) if mode == "L" else pixels.transpose(2, 0, 1)
    assert image.shape == (3, 32, 32)
    # gif has a palette of 256 colours; JPEG halves the resolution of colour
    tolerance = {"gif": 40, "jpg": 16, "webp": 16}.get(ending, 0)
    assert abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "P", "PA", "RGBA", "LA", "CMYK"])
def test_modes_become_rgb(mode, tmp_path):
    image = Image.new("RGB", (9, 7), (255, 255, 255))
    ending = "tif" if mode == "CMYK" else "png"
    image.convert("RGBA" if mode == "PA" else mode).save(tmp_path / f"a.{ending}")
    out = decode(tmp_path / f"a.{ending}", None)
    assert out.shape == (3, 7, 9)
    assert out.min() == 255


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I;16", [[0, 256, 32768, 65535], [256, 0, 0, 0]], [[0, 1, 128, 255], [1, 0, 0, 0]]),
        ("I;16", [[0, 16, 2048, 4095], [1, 17, 31, 32]], [[0, 1, 128, 255], [0, 1, 1, 2]]),  # 12 bits in 16
        ("I;16", [[0, 5, 128, 255], [3, 3, 3, 3]], [[0, 5, 128, 255], [3, 3, 3, 3]]),  # 8 bits in 16
        ("I", [[-100, 0, 100, 155], [0, 0, 0, 0]], [[0, 100, 200, 255], [100] * 4]),
        ("F", [[0.0, 0.25, 0.5, 1.0], [0.125, 0, 0, 0]], [[0, 64, 128, 255], [32, 0, 0, 0]]),
    ],
)
def test_deep_images_are_scaled_by_one_range(mode, values, expected, tmp_path):
    """Of two images; the range is that of both together, and the same when the cache is opened again."""
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    for name, row in zip(("a.tif", "b.tif"), values, strict=True):
        Image.fromarray(np.array([row], kind)).save(tmp_path / name)
    names, place = ["a.tif", "b.tif"], tmp_path / "cache"
    digests = digests_of(tmp_path, names, place, True)
    for _ in range(2):
        images, value_range, _ = cache.decoded(tmp_path, names, digests, None, place, True)
        assert images[:, :, 0].tolist() == [[row] * 3 for row in expected]
        assert value_range == (np.min(values), np.max(values))
    for name, row in zip(names, expected, strict=True):
        assert decode(tmp_path / name, None, value_range)[:, 0].tolist() == [row] * 3
    with pytest.raises(ConfigError, match=r"a\.tif cannot be read as an image \(its values are .* not 8-bit"):
        decode(tmp_path / "a.tif", None)


def test_an_image_outside_the_range_is_refused_not_clipped(tmp_path):
    """As one of another camera is given to predict: it would be white all over. A few brighter pixels may be."""
    for name, values in (("other.png", [60000, 60000, 60000, 9]), ("like.png", [60000, 9, 9, 9])):
        Image.fromarray(np.array([values], np.uint16)).save(tmp_path / name)
    with pytest.raises(ConfigError, match=r"other\.png .*its values are 9 \.\. 60000, those trained on 0 \.\. 2900"):
        decode(tmp_path / "other.png", None, (0.0, 2900.0))
    assert decode(tmp_path / "like.png", None, (0.0, 2900.0))[0].tolist() == [[255, 0, 0, 0]]


@pytest.mark.parametrize(("largest", "told"), [(4095, True), (4096, False), (65535, False)])
def test_twelve_bits_of_colour_in_sixteen_are_refused(largest, told, tmp_path):
    """Pillow keeps the upper eight of sixteen bits of colour: a PNG of one pixel, written by hand."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, 2, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(">HHH", 7, largest, 7))
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b""))
    if told:
        with pytest.raises(ConfigError, match=r"16-bit RGB with values up to 4095 of 65535"):
            decode(path, None)
    else:
        assert decode(path, None)[:, 0, 0].tolist() == [0, largest >> 8, 0]


def test_values_that_are_not_finite(tmp_path):
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"none of the 1 images below .*a\.tif .*it has values that are not finite"):
        decoded(tmp_path, ["a.tif"], None, folder_of(tmp_path))


def test_a_file_that_is_no_image_is_named(tmp_path):
    (tmp_path / "a.png").write_bytes(b"hello")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/a\.png cannot be read as an image \(no format that"):
        decode(tmp_path / "a.png", None)


def test_a_file_that_changes_between_reading_and_decoding(pictures, tmp_path):
    root, names = pictures
    digests = digests_of(root, names, tmp_path / "cache", True)
    (root / names[3]).write_bytes((root / names[4]).read_bytes())
    with pytest.raises(
        ConfigError, match=r"1 broken image below .*003\.jpg \(it was changed in this moment: start again"
    ):
        cache.decoded(root, names, digests, None, tmp_path / "cache", True)
    assert left_in(tmp_path) == set()


def test_a_file_that_is_gone_when_it_is_decoded_is_named(pictures, tmp_path):
    """It is not the cache's fault."""
    root, names = pictures
    digests = digests_of(root, names, tmp_path / "cache", True)
    (root / names[3]).unlink()
    with pytest.raises(ConfigError, match=r"1 broken image below .*003\.jpg \(.*No such file"):
        cache.decoded(root, names, digests, None, tmp_path / "cache", True)


def test_a_picture_larger_than_pillow_allows(tmp_path, monkeypatch):
    """Its own limit, against attacks, does not concern the user's own files."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    Image.new("RGB", (30, 30), (9, 9, 9)).save(tmp_path / "a.png")
    assert (decoded(tmp_path, ["a.png"], 8, folder_of(tmp_path)) == 9).all()


def test_a_large_jpeg_is_decoded_small_and_stays_near_the_full_decode(tmp_path):
    x = np.linspace(0, 6, 512)
    wave = (127 + 100 * np.sin(x[:, None] + 2 * x[None])).astype(np.uint8)
    Image.fromarray(wave).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        full = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    # halving in the DCT domain is another low-pass filter than the bilinear one: some grey levels
    assert abs(decode(tmp_path / "a.jpg", 64).astype(int) - full).max() <= 6


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert decoded(tmp_path, [name], None, folder_of(tmp_path), True).shape == (1, 3, 4, 4)
