"""Pictures as people have them: drawings in nested folders, and the same emojis in two styles, by their tables."""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import run
from pictures import data_config, fresh
from PIL import Image, ImageOps


def test_drawings_are_listed_counted_and_decoded(openclipart, tmp_path):
    """As a walk over the folder, hashlib and Pillow have it; streamed as well as from the cache."""
    for name in ("buildings", "containers", "decorations", "education", "electronics", "science"):
        (tmp_path / "pets").mkdir(exist_ok=True)
        (tmp_path / "pets" / name).symlink_to(openclipart / name)
    files = sorted(openclipart.rglob("*.png"))
    files = [path for path in files if (tmp_path / "pets" / path.relative_to(openclipart).parts[0]).exists()]
    config = data_config(tmp_path, cache_size=48, cache="disk")
    data = fresh(config)
    assert sorted(data.names) == [str(path.relative_to(openclipart)) for path in files]
    assert max(name.count("/") for name in data.names) > 1, "nested"
    contents = defaultdict(set)
    for path in files:
        contents[hashlib.sha256(path.read_bytes()).digest()].add(path.relative_to(openclipart).parts[0])
    both = sum(len(classes) > 1 for classes in contents.values())
    assert f"{both} images lie in two classes" in data.line(48)
    see_through = 0
    for i, name in enumerate(data.names):
        picture = Image.open(openclipart / name).convert("RGBA")
        see_through += picture.getchannel("A").getextrema()[0] < 255
        white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        square = np.asarray(ImageOps.fit(white, (48, 48), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(data.images[i], square.transpose(2, 0, 1))
    assert f"{see_through:,} files with transparent pixels" in data.line(48)
    config.cache = "none"
    np.testing.assert_array_equal(fresh(config).images[np.arange(len(files))], data.images)


@pytest.mark.slow
def test_emojis_in_another_style(emojis, tmp_path, call, monkeypatch):
    """What was trained on one style knows its own better than the other one, of which it has seen nothing."""
    monkeypatch.chdir(tmp_path)
    tables = [(folder / "emoji.json", folder / "img" / folder.name.rpartition("-")[2] / "64") for folder in emojis]
    (labels, images), (other_labels, other_images) = tables
    own = f"data.labels={labels}", f"data.images={images}", f"data.cache_dir={tmp_path}/cache"
    how = "model=vit_tiny", "data.train_examples=800", "optimizer.lr=3e-3", "trainer.epochs=3"
    how += "trainer.precision=fp32", "data.batch_size=32"
    trained = run([sys.executable, "-m", "lora_vit.train", "data=table", *own, *how, "hydra.run.dir=trial"], tmp_path)
    assert "1,875 images that the table does not name" in trained.stdout
    code, _, _ = call("evaluate", "trial", "--split", "test", "--csv", "own.csv")
    rows = pd.read_csv("own.csv")
    known = pd.read_json(labels).set_index("image")["category"]
    assert rows["true"].tolist() == [known[Path(path).name] for path in rows["path"]]
    given = "--labels", other_labels, "--data-root", other_images, "--csv", "other.csv", "--out", "errors"
    code, said, _ = call("evaluate", "trial", *given)
    assert (code, "it was trained on 0 of them" in said) == (0, True)
    others = pd.read_csv("other.csv")
    assert {*others["true"]} == {*known}
    right, right_of_others = (frame["true"] == frame["predicted"] for frame in (rows, others))
    assert f"External Accuracy: {right_of_others.mean():.2%}  (1,911 images)" in said
    assert 0.2 < right_of_others.mean() < right.mean() - 0.05
    assert Path("errors/errors.html").read_text().count("<img") == 60
