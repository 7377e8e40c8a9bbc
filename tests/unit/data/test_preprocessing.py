"""The description of what is done to a picture: it does what training did, and is read from every file that has it."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from plain_trials import plain_trial
from safetensors.torch import save_file

from lora_vit import preprocessing
from lora_vit.data.augment import Transform
from lora_vit.data.preprocessing import Decoding, Preprocessing
from lora_vit.errors import ConfigError

HOW = Preprocessing(Decoding(16, (3.0, 4095.0), (1, 2, 3)), 24, (0.5, 0.4, 0.3), (0.3, 0.2, 0.1), "bicubic")


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    return tmp_path / "wide.png"


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("decoded", "side"), [(None, 24), (16, 24), (40, 24), (24, 24)])
def test_it_gives_what_training_gave(decoded, side, interpolation, picture):
    """Which resamples whole batches by matrices: float32 either way."""
    how = Preprocessing(Decoding(decoded), side, HOW.mean, HOW.std, interpolation)
    colours, cpu = (HOW.mean, HOW.std), torch.device("cpu")
    data = plain_trial({"data.augment": "none"}).data
    transform = Transform(data, side, cpu, torch.float32, *colours, interpolation == "bicubic")
    expected = transform.eval(torch.from_numpy(how.decoding(picture))[None])[0]
    assert how(picture).dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(how(picture)), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["RGBA png", "LA png", "P png", "P gif"])
@pytest.mark.parametrize(("background", "seen"), [((255, 255, 255), 255), ((0, 9, 0), 9), (None, 200)])
def test_what_is_transparent_shows_the_background(kind, background, seen, tmp_path):
    """Hidden colours stay hidden; adapters from before there was a background were trained on them."""
    mode, ending = kind.split()
    image = Image.new("RGBA", (2, 1), (200, 200, 200, 255))
    image.putpixel((1, 0), (200, 200, 200, 0))
    if mode == "P":
        plain = Image.new("P", (2, 1))
        plain.putpalette([200] * 6)
        plain.putpixel((1, 0), 1)
        plain.save(tmp_path / f"a.{ending}", transparency=1)
    else:
        image.convert(mode).save(tmp_path / f"a.{ending}")
    pixels = Decoding(None, background=background)(tmp_path / f"a.{ending}")
    assert pixels[1, 0].tolist() == [200, seen]


def test_pillows_images_are_prepared_as_their_files_and_stay_as_they_are(picture, tmp_path):
    large = tmp_path / "large.jpg"  # decodes straight to a smaller size
    with Image.open(picture) as image:
        image.resize((900, 400)).save(large)
    for decoded, file in ((None, picture), (16, picture), (16, large)):
        how = Preprocessing(Decoding(decoded), 24, HOW.mean, HOW.std, "bilinear")
        with Image.open(file) as image:
            size = image.size
            np.testing.assert_array_equal(how(image), how(file))
            found = how(image.copy())
            np.testing.assert_array_equal(how(image), found)  # decoded by now
            assert image.size == size
        # two ways to a smaller size differ by a level of 255 on average, over the deviation
        assert np.abs(found - how(file)).mean() <= (0.05 if file == large else 0)
    with Image.open(io.BytesIO(large.read_bytes())) as image:
        how(image)
        assert image.size == (900, 400)
    deep = Image.fromarray(np.full((20, 20), 2049, np.uint16))
    assert HOW(deep).shape == (3, 24, 24)
    with pytest.raises(ConfigError, match=r"mode=I;16 .* cannot be read as an image \(its values are 2049 .. 2049"):
        Decoding(None)(deep)


def test_every_file_that_has_it_gives_it_back(tmp_path):
    about = {"preprocessing": HOW.to_dict()}
    for name in ("trial/adapter.json", "export/lora_vit.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(about))
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors", {"lora_vit": json.dumps(about)})
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/extra/lora_vit.json", json.dumps(about))
    for place in ("trial", "export", "export/lora_vit.json", "m.safetensors", "model.pt2"):
        assert preprocessing(str(tmp_path / place)) == HOW


def test_older_adapters_say_it_in_parts(tmp_path):
    base = {"image_size": 24, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1], "interpolation": "bicubic"}
    (tmp_path / "adapter.json").write_text(json.dumps({"base": base, "decoded_size": 16, "value_range": [3, 4095]}))
    assert preprocessing(tmp_path) == Preprocessing(Decoding(16, (3, 4095), None), *list(vars(HOW).values())[1:])


@pytest.mark.parametrize("name", ["", "none", "other.json", "m.safetensors", "m.pt2"])
def test_where_nothing_says_it_that_is_one_line(name, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "m.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    (tmp_path / "m.pt2").write_bytes(b"PK")
    with pytest.raises(ConfigError) as caught:
        preprocessing(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)
