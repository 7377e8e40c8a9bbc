"""Fetch and decode a data set ahead of training, with the settings of conf/data/NAME.yaml.

    python scripts/prepare_data.py tiny_imagenet
    python scripts/prepare_data.py imagefolder --root photos --cache-size 224

Training with the same root, cache folder and cache size then starts at once (on a cluster: run this where there
is a network, once, before the jobs).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hydra import compose
from omegaconf import OmegaConf

from lora_vit.compose import initialized
from lora_vit.config import DATASETS, DataConfig
from lora_vit.data.dataset import load_data
from lora_vit.errors import ConfigError, reporting

PRESETS = sorted(path.stem for path in (Path(__file__).resolve().parent.parent / "conf" / "data").glob("*.yaml"))


def data_config(preset: str, **given: str | int | bool | None) -> DataConfig:
    """The data set's own settings with what is given.

    Raises:
        ConfigError: something is missing, or has no effect on this data set.
    """
    with initialized():
        data = compose("config", overrides=[f"data={preset}"]).data
        # The batch size has no part in preparing, and must not refuse a small data set.
        data.update({"batch_size": 1, **{key: value for key, value in given.items() if value is not None}})
        if OmegaConf.is_missing(data, "root"):
            raise ConfigError(f"{preset} has no folder of its own: give --root DIR")
        if data.official_val and "official_val" not in DATASETS[data.name].reads:
            raise ConfigError(f"--official-val has no effect: {preset} has no such images")
        config = OmegaConf.to_object(data)
    assert isinstance(config, DataConfig)
    return config


def prepare(config: DataConfig) -> int:
    """Load the data set once, and say what it holds."""
    data = load_data(config)
    count, _, height, width = data.images.shape
    print(f"{config.name}: {count:,} images of {width}x{height} pixels in {len(data.class_names)} classes")
    for split, ids in data.splits.items():
        print(f"  {split:<12} {len(ids):>9,}")
    print(f"  fingerprint  {data.fingerprint}")
    return 0


def main() -> None:
    """Command-line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=PRESETS)
    parser.add_argument("--root", help="data.root: where the files are, or shall be")
    parser.add_argument("--cache-dir", help="data.cache_dir")
    parser.add_argument("--cache-size", type=int, help="data.cache_size: pixels of each side")
    parser.add_argument("--official-val", action="store_true", default=None, help="data.official_val=true")
    given = vars(parser.parse_args())
    with reporting():
        prepare(data_config(given.pop("dataset"), **given))


if __name__ == "__main__":
    main()
