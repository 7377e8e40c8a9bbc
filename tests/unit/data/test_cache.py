"""The decoded cache: which files it stands for, who builds it, and how a build may end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import wait_until
from pictures import decoded, paint, refused, shades
from PIL import Image

from lora_vit.data import cache, decode
from lora_vit.data.files import digests_of
from lora_vit.data.preprocessing import Decoding


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
    """There are two cores."""
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)


def left_in(place: Path) -> set[str]:
    """Endings of what lies in the cache, but for the files' digests and locks."""
    return {path.suffix for path in place.iterdir()} - {".npz", ".lock"}


def refused_build(root: Path, names: list[str]) -> str:
    """The one line; nothing is left of the cache."""
    message = refused(decoded, root, names, None, root.parent / "cache")
    assert left_in(root.parent / "cache") == set()
    return message


@pytest.mark.parametrize(("size", "workers"), [(None, 2), (16, 2), (20, 1)])
def test_every_row_is_filled(size, workers, pictures, two_workers, monkeypatch):
    monkeypatch.setattr("joblib.cpu_count", lambda: workers)
    root, names = pictures
    images = decoded(root, names, size)[0]
    assert images.shape == (300, 3, *((24, 40) if size is None else (size, size)))
    for row, name in zip(images, names, strict=True):
        np.testing.assert_array_equal(row, Decoding(size)(root / name))
    with pytest.raises(ValueError, match="read-only"):
        images[0] = 0


def test_every_broken_file_is_named_up_to_twenty(pictures, two_workers):
    root, names = pictures
    for name in names[10:35]:
        (root / name).write_bytes((root / name).read_bytes()[:200])
    message = refused_build(root, names)
    assert all(name in message for name in names[10:30])
    assert "25 broken images" in message
    assert "and 5 more" in message
    assert names[30] not in message
    assert re.search(r"^20 broken images .*\); repair or remove", refused_build(root, names[10:30])), "all are broken"


def test_images_of_several_sizes_need_a_cache_size(tmp_path):
    for i, width in enumerate((12, 14, 13)):
        paint(tmp_path / "a" / f"{i}.png", 0, (width, 12))
    message = refused_build(tmp_path / "a", ["0.png", "2.png", "1.png"])
    assert "a/1.png is 14x12, other images are 12x12: give data.cache_size" in message
    assert decoded(tmp_path / "a", ["0.png", "1.png"], 8)[0].shape == (2, 3, 8, 8)


@pytest.mark.parametrize("harm", ["changed", "gone"])
def test_a_file_that_changes_between_reading_and_decoding_is_named(harm, pictures, tmp_path, monkeypatch):
    """It is not the cache's fault."""
    root, names = pictures
    digests = digests_of(root, names, tmp_path / "cache")
    monkeypatch.setattr("pictures.digests_of", lambda *_: digests)
    (root / names[3]).unlink()
    if harm == "changed":
        (root / names[3]).write_bytes((root / names[4]).read_bytes())
    reason = "it changed after it was first read" if harm == "changed" else ".*No such file"
    assert re.search(rf"1 broken image below .*003\.jpg \({reason}", refused_build(root, names))


def test_a_full_disk_is_an_error_of_one_line(pictures, two_workers, monkeypatch):
    """/dev/full takes the place of the partial file: every write to it fails as on a full disk."""
    monkeypatch.setattr(decode, "open", lambda out, mode: Path.open(Path("/dev/full"), mode), raising=False)
    message = refused_build(*pictures)
    assert "data.cache_dir=" in message
    assert "No space left" in message


def test_a_cache_larger_than_the_disk_is_refused_with_its_size(pictures, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    assert "data.cache=disk: 0.0 GiB decoded" in refused_build(*pictures)


def test_it_is_kept_and_follows_the_files(tmp_path, monkeypatch):
    """Not their places, names or times."""
    for i in range(4):
        paint(tmp_path / "a" / f"{i}.bmp", i)
    names, place = [f"{i}.bmp" for i in range(4)], tmp_path / "cache"
    assert shades(decoded(tmp_path / "a", names, None, place)) == [0, 1, 2, 3]
    paint(tmp_path / "a" / "2.bmp", 77)  # of the same size
    os.utime(tmp_path / "a" / "2.bmp", ns=(0, 0))
    images = decoded(tmp_path / "a", names, None, place)[0]
    assert isinstance(images, np.memmap)
    assert shades(decoded(tmp_path / "a", names, None, place)) == [0, 1, 77, 3]
    assert decoded(tmp_path / "a", names, 4, place)[0].shape == (4, 3, 4, 4), "another size is another cache"
    (tmp_path / "a").rename(tmp_path / "moved")
    monkeypatch.setattr(cache, "_build", lambda *_: pytest.fail("decoded again"))
    np.testing.assert_array_equal(decoded(tmp_path / "moved", names, None, place)[0], images)


def test_a_cache_of_an_earlier_release_is_found(tmp_path):
    """Its name is spelt out: with another one everybody's images would be decoded again."""
    paint(tmp_path / "a.bmp", 7)
    decoded(tmp_path, ["a.bmp"], 4)
    assert [path.name for path in (tmp_path / "cache").glob("*.npy")] == ["images-5f73f41c48ad7b9b.npy"]


@pytest.mark.parametrize(
    "harm", ["cut", "short", "kind", "header", "pixel", "range gone", "range cut", "range of another kind"]
)
def test_a_damaged_cache_is_made_again(harm, tmp_path):
    """Without its range the images would pass for 8-bit ones, and predict would refuse their like."""
    for i in range(3):
        Image.fromarray(np.array([[i, 4095]], np.uint16)).save(tmp_path / f"{i}.png")
    for _ in range(2):
        images, *beside_them = decoded(tmp_path, ["0.png", "1.png", "2.png"])
        assert images[0, 0].tolist() == [[0, 255]]
        assert beside_them == [(0.0, 4095.0), ("3 files with more than 8 bits",)]
        (array,), (beside,) = (tmp_path / "cache").glob("*.npy"), (tmp_path / "cache").glob("*.json")
        if harm == "cut":
            array.write_bytes(array.read_bytes()[:130])
        elif harm in ("short", "kind"):
            np.save(array, images[:-1] if harm == "short" else images.astype(np.float32))
        elif harm == "pixel":
            np.lib.format.open_memmap(array, "r+")[1, 2, 0, 1] = 7
        elif harm == "header":
            array.write_bytes(array.read_bytes().replace(b"False", b"Fals{"))
        elif harm == "range gone":
            beside.unlink()
        else:
            beside.write_text("[1.0" if harm == "range cut" else "{}")


def test_of_a_large_cache_blocks_all_over_it_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_BLOCK", 2)
    monkeypatch.setattr(cache, "_BLOCKS", 5)
    seen = []
    for i in range(21):  # at last all are as at first
        (tmp_path / "a").write_bytes(bytes(1 if at == i else 0 for at in range(20)))
        seen.append(cache._digest(tmp_path / "a"))
    assert [i for i in range(20) if seen[i] != seen[20]] == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17]


def test_files_with_several_pictures_are_counted_and_the_first_is_used(tmp_path):
    """A photo with a preview of itself (MPO) is one picture."""
    first, second = Image.new("L", (2, 1), 10), Image.new("L", (2, 1), 200)
    for name in ("a.gif", "b.tif", "c.webp", "d.png", "e.mpo"):
        first.save(tmp_path / name, save_all=True, append_images=[second])
    first.save(tmp_path / "f.tif")
    whole = (tmp_path / "b.tif").read_bytes()
    (tmp_path / "g.tif").write_bytes(whole[: len(whole) // 2 + 20])  # cut in its second page
    names = sorted(path.name for path in tmp_path.iterdir())
    for _ in range(2):
        images, _, told = decoded(tmp_path, names)
        assert (abs(images.astype(int) - 10) <= 2).all()
        assert told == ("5 files with several pictures: the first is used",)


BUILD = """
print("script", flush=True)
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
from pathlib import Path
from lora_vit.data import cache
from lora_vit.data.files import digests_of
from lora_vit.data.preprocessing import Decoding
from lora_vit.errors import reporting
build, cache._CHUNK = cache._build, 1
def counted(*args):
    print("built", flush=True)
    return build(*args)
cache._build = counted
root, place = Path(sys.argv[1]), Path(sys.argv[2])
names = sorted(p.name for p in root.iterdir())
digests = digests_of(root, names, place)
with reporting():
    sys.exit(len(cache.decoded(root, names, digests, place, Decoding(None))[0]) - len(names))
"""
# A script without ``if __name__ == "__main__"``, as a user of the library may write.


def test_runs_that_start_together_build_once_and_run_their_script_once(pictures, tmp_path):
    """Not once more in each process, as multiprocessing's would run it; from a pipe there is none to run."""
    (tmp_path / "script.py").write_text(BUILD)
    with (tmp_path / "script.py").open() as script:
        runs = [
            subprocess.Popen([sys.executable, name, "pictures", "cache"], cwd=tmp_path, stdin=script, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            for name in ("script.py", "-")
        ]  # fmt: skip
        output = [run.communicate(timeout=60)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert sorted(re.sub(".* images in .*\n", "", said) for said in output) == ["script\n", "script\nbuilt\n"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_build_leaves_no_cache(how, tmp_path):
    """Enough large images that the build cannot be over before the signal, which a terminal sends to all processes."""
    root = tmp_path / "large"
    root.mkdir()
    noise = np.random.default_rng(1).integers(0, 256, (1500, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(root / "000.png")
    for i in range(1, 40):
        os.link(root / "000.png", root / f"{i:03d}.png")
    line = [sys.executable, "-c", BUILD, "large", "cache"]
    run = subprocess.Popen(
        line, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    wait_until(lambda: list((tmp_path / "cache").glob("*.partial")), run)
    os.killpg(run.pid, how) if how == signal.SIGINT else os.kill(run.pid, how)
    output = run.communicate(timeout=30)[0]
    if how == signal.SIGINT:
        assert (run.returncode, output) == (130, "script\nbuilt\ninterrupted\n")
        assert left_in(tmp_path / "cache") == set()
    assert not list((tmp_path / "cache").glob("*.npy"))
    assert decoded(root, ["000.png", "001.png"], 8, tmp_path / "cache")[0].shape == (2, 3, 8, 8)
