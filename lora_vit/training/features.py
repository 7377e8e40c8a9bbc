"""Features for images: what a frozen trunk makes of a picture, computed once and kept beside the decoded images.

Where the head alone is trained and pictures are mirrored at most, each has one vector or two. They are laid out as a
picture of one channel is, a feature in each row and a vector in each column: mirroring it exchanges the two.
Shape legend: N sample, B picture of a part, W feature, V vector (1 or 2: the picture's and its mirror image's).
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from joblib import cpu_count

from lora_vit.config import TrialConfig
from lora_vit.data.files import locked_in, writing_to
from lora_vit.data.stream import Samples
from lora_vit.errors import ConfigError
from lora_vit.files import user_path
from lora_vit.models.vit import shape_of
from lora_vit.terminal import Progress
from lora_vit.training.loop import computing
from lora_vit.training.pack import halving
from lora_vit.training.trial import Setup

_FORMAT = 1


def with_features(setup: Setup, config: TrialConfig, heed: Callable[[], None], sharing: int = 1) -> Setup:
    """The setup with features for images, where a trial needs no more of them; else the setup itself.

    What no run has computed is computed now, while others that need it wait. ``heed``: called often, may raise;
    ``sharing``: processes that have equal shares of the cores. Where features cannot be kept, a line says so.
    """
    if config.lora.method != "none" or not {*config.data.augmentations()} <= {"none", "flip"}:
        return setup
    if setup.of_probes is None:
        start, threads = time.perf_counter(), torch.get_num_threads()
        torch.set_num_threads(max(threads, min(cpu_count(), threads * sharing)))  # the others wait
        try:
            samples = Samples(setup.data, setup.device, _features(setup, config, heed))
            setup.of_probes = replace(setup, samples=samples, cost={"features_seconds": time.perf_counter() - start})
        except ConfigError as error:
            print(f"note: no features are kept, every epoch computes its own ({error})")
            setup.of_probes = setup
        finally:
            torch.set_num_threads(threads)
    return setup.of_probes


def _features(setup: Setup, config: TrialConfig, heed: Callable[[], None]) -> np.ndarray:
    """Those of all images that are used, [N, 1, W, V], mapped. Raises ConfigError where there is no place for them.

    The file grows in place; each of its vectors ends with a checksum, without which it is absent or damaged.
    """
    data, V, cache_dir = setup.data, 1 + ("flip" in config.data.augmentations()), user_path(config.data.cache_dir)
    base = {key: value for key, value in setup.base.items() if key != "weights"}  # a name or a place
    here: Any = setup.environment
    computed = here["precision"], here["device"], here["versions"]["torch"]
    identity = json.dumps([_FORMAT, V, base, data.content, vars(data.decoding), *computed], sort_keys=True)
    path = cache_dir / f"features-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npy"
    with locked_in(cache_dir, path.name), writing_to(cache_dir):
        try:
            kept = np.load(path, mmap_mode="r+")
        except (OSError, ValueError):  # absent or cut off
            path.unlink(missing_ok=True)  # others may have mapped it
            shape = len(data.labels), 1, shape_of(config.model).width + 1, V
            kept = np.lib.format.open_memmap(path, "w+", "f8" if here["precision"] == "fp64" else "f4", shape)
        needed = kept[0].nbytes * sum(map(len, data.splits.values())) - 512 * path.stat().st_blocks
        if needed > (free := shutil.disk_usage(cache_dir).free):
            lacking = f"features need {needed / 2**30:.1f} GiB, {cache_dir} has {free / 2**30:.1f} GiB"
            raise ConfigError(f"{lacking}: give another data.cache_dir")
        with computing(setup.device, config.trainer.deterministic):
            _fill(kept, setup, config, heed)
        kept.flush()
    return kept[:, :, :-1]


@torch.no_grad()
def _fill(kept: Any, setup: Setup, config: TrialConfig, heed: Callable[[], None]) -> None:
    """Compute what is missing, part by part of the pictures: the same parts as a validation's."""
    trunk, splits = setup.build_model([config]).trunk.eval(), setup.data.splits
    whole = np.dtype(f"i{kept.itemsize}")
    with Progress("features", sum(map(len, splits.values()))) as bar:
        for name, left in splits.items():
            while len(left):
                heed()
                some = left[: max(1, setup.most_evaluated)]
                with halving(setup, "most_evaluated", len(some), 1):
                    bits_BWV = kept[some, 0].view(whole)
                    lacks_BV = (bits_BWV[:, :-1].sum(1, dtype=whole) != ~bits_BWV[:, -1])[:, : 1 + (name == "train")]
                    images: Any = setup.samples.gather(some)[0] if lacks_BV.any() else None
                    for v in np.flatnonzero(lacks_BV.any(0)):
                        found = trunk(setup.transform.eval(images.flip(-1) if v else images))
                        found_BW = found.double().cpu().numpy().astype(kept.dtype)
                        sums_B1 = ~found_BW.view(whole).sum(1, dtype=whole, keepdims=True)
                        new_B = lacks_BV[:, v]  # others may be reading the rest
                        kept[some[new_B], 0, :, v] = np.hstack([found_BW, sums_B1.view(kept.dtype)])[new_B]
                    bar.advance(len(some))
                    left = left[len(some) :]
