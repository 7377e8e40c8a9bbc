"""What one file becomes."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from pictures import decoded, refused, shades
from PIL import Image, PngImagePlugin

from lora_vit.data.preprocessing import Decoding
from lora_vit.errors import ConfigError


def test_short_side_is_resized_and_the_centre_kept(tmp_path):
    """Of a picture three times as wide as high the middle third is left; Pillow's filter is antialiased."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 120, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "a.png")
    expected = picture.resize((20, 20), Image.Resampling.BILINEAR, box=(40, 0, 80, 40))
    np.testing.assert_array_equal(Decoding(20)(tmp_path / "a.png"), np.asarray(expected).transpose(2, 0, 1))


def test_a_large_jpeg_is_decoded_small_and_stays_near_the_full_decode(tmp_path):
    x = np.linspace(0, 6, 512)
    wave = (127 + 100 * np.sin(x[:, None] + 2 * x[None])).astype(np.uint8)
    Image.fromarray(wave).convert("RGB").save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        full = np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    # halving in the DCT domain is another low-pass filter than the bilinear one: some grey levels
    assert 0 < abs(Decoding(64)(tmp_path / "a.jpg").astype(int) - full).max() <= 6


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "webp", "gif", "tif", "ppm"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats(ending, mode, tmp_path):
    """A smooth picture, so that lossy formats stay near it."""
    grey = np.broadcast_to(np.linspace(40, 200, 32).astype(np.uint8), (32, 32))
    pixels = grey if mode == "L" else np.stack([grey, grey.T, grey[:, ::-1]], -1)
    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"a.{ending}")
    image = Decoding(None)(tmp_path / f"a.{ending}")
    expected = np.stack([pixels] * 3) if mode == "L" else pixels.transpose(2, 0, 1)
    assert image.shape == (3, 32, 32)
    # gif has a palette of 256 colours; JPEG halves the resolution of colour
    tolerance = {"gif": 40, "jpg": 16, "webp": 16}.get(ending, 0)
    assert abs(image.astype(int) - expected).max() <= tolerance


@pytest.mark.parametrize("mode", ["1", "P", "PA", "RGBA", "LA", "CMYK"])
def test_modes_become_rgb(mode, tmp_path):
    image = Image.new("RGB", (9, 7), (255, 255, 255))
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.convert("RGBA" if mode == "PA" else mode).save(path)
    out = Decoding(None)(path)
    assert (out.shape, out.min()) == ((3, 7, 9), 255)


def test_an_image_is_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10), (0, 0, 0))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert Decoding(None)(tmp_path / "turned.jpg").shape == (3, 20, 10)


@pytest.mark.parametrize(
    ("mode", "values", "expected"),
    [
        ("I;16", [[0, 256, 32768, 65535], [256, 0, 0, 0]], [[0, 1, 128, 255], [1, 0, 0, 0]]),
        ("I;16", [[0, 16, 2048, 4095], [1, 17, 31, 32]], [[0, 1, 128, 255], [0, 1, 1, 2]]),  # 12 bits in 16
        ("I;16", [[0, 5, 128, 255], [3, 3, 3, 3]], [[0, 5, 128, 255], [3, 3, 3, 3]]),  # 8 bits in 16
        ("I", [[-100, 0, 100, 155], [0, 0, 0, 0]], [[0, 100, 200, 255], [100] * 4]),
        ("F", [[0.0, 0.125, 0.25, 0.5], [0.0625, 0, 0, 0]], [[0, 64, 128, 255], [32, 0, 0, 0]]),
    ],
)
def test_deep_images_are_scaled_by_one_range(mode, values, expected, tmp_path):
    """Of two images; the range is that of both together, and the same when the cache is opened again."""
    kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    names = ["a.tif", "b.tif"]
    for name, row in zip(names, values, strict=True):
        Image.fromarray(np.array([row], kind)).save(tmp_path / name)
    for _ in range(2):
        images, value_range, _ = decoded(tmp_path, names)
        assert images[:, :, 0].tolist() == [[row] * 3 for row in expected]
        assert value_range == (np.min(values), np.max(values))
    for name, row in zip(names, expected, strict=True):
        assert Decoding(None, value_range)(tmp_path / name)[:, 0].tolist() == [row] * 3


def test_an_image_outside_the_range_is_refused_not_clipped(tmp_path):
    """As one of another camera is given to predict: it would be white all over. A few brighter pixels may be."""
    for name, values in (("other.png", [60000, 60000, 60000, 9]), ("like.png", [60000, 9, 9, 9])):
        Image.fromarray(np.array([values], np.uint16)).save(tmp_path / name)
    with pytest.raises(ConfigError, match=r"other\.png .*its values are 9 \.\. 60000, value_range is 0 \.\. 2900"):
        Decoding(None, (0.0, 2900.0))(tmp_path / "other.png")
    with pytest.raises(ConfigError, match=r"other\.png .*its values are 9 \.\. 60000, not 8-bit"):
        Decoding(None)(tmp_path / "other.png")
    assert Decoding(None, (0.0, 2900.0))(tmp_path / "like.png")[0].tolist() == [[255, 0, 0, 0]]


def sixteen_bits(path: Path, kind: int, *values: int) -> None:
    """A PNG of one pixel, written by hand: Pillow writes no colours of 16 bits. ``kind``: 2 RGB, 4 LA, 6 RGBA."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", 1, 1, 16, kind, 0, 0, 0)
    pixel = zlib.compress(b"\0" + struct.pack(f">{len(values)}H", *values))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixel) + chunk(b"IEND", b""))


@pytest.mark.parametrize("largest", [4095, 4096, 65535])
def test_twelve_bits_of_colour_in_sixteen_are_refused(largest, tmp_path):
    """Pillow keeps the upper eight of sixteen bits of colour."""
    path = tmp_path / "a.png"
    sixteen_bits(path, 2, 7, largest, 7)
    if largest == 4095:
        with pytest.raises(ConfigError, match=r"16-bit RGB with values up to 4095 of 65535"):
            Decoding(None)(path)
    else:
        assert Decoding(None)(path)[:, 0, 0].tolist() == [0, largest >> 8, 0]


def test_fourteen_bits_of_colour_are_scaled_as_those_of_grey_are(tmp_path):
    """One range for all, whatever is transparent."""
    for name, kind, values in (("a", 2, (0, 8192, 16383)), ("b", 4, (8192, 65535)), ("c", 6, (0, 0, 0, 0))):
        sixteen_bits(tmp_path / f"{name}.png", kind, *values)
    images, value_range, told = decoded(tmp_path, ["a.png", "b.png", "c.png"])
    assert value_range == (0, 16383)
    assert told == ("3 files with more than 8 bits", "1 file with transparent pixels")
    assert images[..., 0, 0].tolist() == [[0, 128, 252], [128] * 3, [255] * 3]


def some(low: float, high: float, kind: type) -> np.ndarray:
    """Values that fill a range, 32 x 32."""
    return np.linspace(low, high, 1024).reshape(32, 32).astype(kind)


def test_pixels_without_data_are_none(tmp_path):
    """As the tag that GDAL writes says which these are."""
    for name, no_data in (("a.tif", "-9999"), ("b.tif", "nan "), ("c.tif", "-3.4028234663852886e+38")):
        pixels = some(0, 10, np.float32)
        pixels[:2] = float(no_data)
        Image.fromarray(pixels).save(tmp_path / name, tiffinfo={42113: no_data})
    images, value_range, _ = decoded(tmp_path, ["a.tif", "b.tif", "c.tif"])
    assert value_range == (some(0, 10, np.float32)[2, 0], 10)
    assert (images[:, :, :2] == 0).all()
    assert (images[:, :, -1, -1] == 255).all()
    Image.fromarray(np.full((4, 4), -1, np.float32)).save(tmp_path / "d.tif", tiffinfo={42113: "-1"})
    assert "d.tif (none of its pixels holds data)" in refused(decoded, tmp_path, ["a.tif", "d.tif"])


@pytest.mark.parametrize(("odd", "share", "high", "kind"), [
    (65535, 1, 4095, np.uint16), (-9999, 1, 1, np.float32), (-9999, 9, 1, np.float32), (-9999, 400, 1, np.float32),
])  # fmt: skip
def test_a_value_that_stands_alone_decides_no_range(odd, share, high, kind, tmp_path):
    """However many pixels have it."""
    for name in ("a.tif", "b.tif"):
        pixels = some(0, high, kind)
        pixels.flat[:share] = odd if name == "b.tif" or share > 9 else 0
        Image.fromarray(pixels).save(tmp_path / name)
    message = refused(decoded, tmp_path, ["a.tif", "b.tif"])
    assert f".tif has the value {odd}: by " in message
    assert "data.value_range=[low,high]" in message
    images, value_range, told = decoded(tmp_path, ["a.tif", "b.tif"], value_range=(0.0, high))
    clipped = f"{'2 files' if share > 9 else '1 file'} with values beyond this range, which are clipped"
    assert told == ("2 files with more than 8 bits", clipped)
    assert (value_range, images.max(), images[1, 0, 0, 0]) == ((0, high), 255, 255 * (odd > 0))
    other = decoded(tmp_path, ["a.tif", "b.tif"], value_range=(0.0, 2.0 * high))
    assert shades(other) != shades(decoded(tmp_path, ["a.tif", "b.tif"], value_range=(0.0, high)))


def test_deep_images_of_few_values_keep_them(tmp_path):
    for name, low in (("a.tif", 0), ("b.tif", 50000)):
        Image.fromarray(np.array([[low, 60000]], np.uint16)).save(tmp_path / name)
    assert decoded(tmp_path, ["a.tif", "b.tif"])[1] == (0, 60000)


@pytest.mark.parametrize(("high", "kind"), [(65535, np.uint16), (4095, np.uint16), (1, np.float32)])
def test_deep_images_among_others(high, kind, tmp_path):
    """16 bits are as many times brighter; of other depths nobody knows."""
    Image.fromarray(some(0, 255, np.uint8)).save(tmp_path / "a.png")
    Image.fromarray(some(0, high, kind)).save(tmp_path / "b.tif")
    if high == 65535:
        images, *beside = decoded(tmp_path, ["a.png", "b.tif"])
        assert beside == [(0, 65535), ("1 file with more than 8 bits",)]
        assert abs(images[0].astype(int) - images[1]).max() <= 1
    else:
        message = refused(decoded, tmp_path, ["a.png", "b.tif"])
        assert f"1 of 2 images below {tmp_path} have more than 8 bits (0 .. {high}): " in message


def test_files_that_are_no_images_are_named(tmp_path):
    (tmp_path / "text.png").write_bytes(b"hello")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/text\.png cannot be read as an image \(no format that"):
        Decoding(None)(tmp_path / "text.png")
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ConfigError, match=r"a\.tif .*values that are not finite"):
        Decoding(None)(tmp_path / "a.tif")


def test_a_picture_larger_than_pillow_allows(tmp_path, monkeypatch):
    """Its own limits, of pixels and of text beside them, are against attacks: they do not concern the user's files."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 10)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 30, zip=True)
    Image.new("RGB", (30, 30), (9, 9, 9)).save(tmp_path / "a.png", pnginfo=text)
    assert (Decoding(8)(tmp_path / "a.png") == 9).all()


@pytest.mark.parametrize("hot", [0, 60000])
def test_twelve_bits_beside_eight_are_no_black_pictures(hot, tmp_path):
    """All of 16 bits counts beside 8 bits, also where one pixel reaches that high."""
    for name in ("a.png", "b.png"):
        pixels = some(0, 4095, np.uint16)
        pixels[0, 0] = hot
        Image.fromarray(pixels).save(tmp_path / name)
    Image.new("L", (32, 32), 100).save(tmp_path / "c.png")
    message = refused(decoded, tmp_path, ["a.png", "b.png", "c.png"])
    assert f"2 of 3 images below {tmp_path} have more than 8 bits " in message
    assert f" .. {hot or 4095}): " in message
    assert "data.value_range=[low,high]" in message
