"""Fetch and decode a data set ahead of training, with the settings of conf/data/NAME.yaml.

    python scripts/prepare_data.py tiny_imagenet
    python scripts/prepare_data.py imagefolder --root photos --cache-size 224

Training with the same root, cache folder and cache size then starts at once (on a cluster: run this where there
is a network, once, before the jobs).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from omegaconf import OmegaConf

from lora_vit.compose import register_schema
from lora_vit.config import DataConfig
from lora_vit.data.load import load_data
from lora_vit.errors import run_command

CONF = Path(__file__).resolve().parent.parent / "conf" / "data"


def data_config(args: argparse.Namespace) -> DataConfig:
    """The data set's own settings with what the command line changes."""
    given = {key: value for key in ("root", "cache_dir", "cache_size") if (value := getattr(args, key)) is not None}
    # The batch size has no part in preparing, and must not refuse a small data set.
    given |= {"official_val": args.official_val, "batch_size": 1}
    register_schema()
    config = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(CONF / f"{args.dataset}.yaml"), given)
    whole = OmegaConf.create({"model": {"image_size": 224}, "data": config})  # the size that the cache follows
    prepared = OmegaConf.to_object(whole.data)
    assert isinstance(prepared, DataConfig)
    return prepared


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
    parser.add_argument("dataset", choices=sorted(path.stem for path in CONF.glob("*.yaml")))
    parser.add_argument("--root", help="data.root: where the files are, or shall be")
    parser.add_argument("--cache-dir", help="data.cache_dir")
    parser.add_argument("--cache-size", type=int, help="data.cache_size: pixels of each side")
    parser.add_argument("--official-val", action="store_true", help="data.official_val=true (tiny_imagenet)")
    args = parser.parse_args()
    if args.root is None and "???" in (CONF / f"{args.dataset}.yaml").read_text():
        parser.error(f"{args.dataset} has no folder of its own: give --root DIR")
    if args.cache_size is not None and args.cache_size < 8:
        parser.error("--cache-size: give a number of pixels from 8 up")
    if args.official_val and args.dataset != "tiny_imagenet":
        parser.error("--official-val has no effect here: only tiny_imagenet has such a folder")
    run_command(lambda: prepare(data_config(args)))


if __name__ == "__main__":
    main()
