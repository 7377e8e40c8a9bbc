"""Labelled pictures that are not a trial's own: of its classes, and prepared as its own were."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lora_vit.config import DATASETS, DataConfig
from lora_vit.data.dataset import ImageData, find, known_content, load_data
from lora_vit.data.preprocessing import Preprocessing
from lora_vit.errors import ConfigError
from lora_vit.files import user_path

EXTERNAL = "external"  # the one part that such pictures are in


def elsewhere(own: DataConfig, root: str | None, labels: str | None, columns: Sequence[str] | None,
              card: Mapping[str, Any]) -> DataConfig:  # fmt: skip
    """What reads pictures for an adapter (its card): its data at ``root``, folders named as its classes, or a table."""
    if labels is not None:
        image, label = columns or (own.image_column, own.label_column)
        own = replace(own, image_column=image, label_column=label, split_column=None)
        return replace(own, name="table", labels=labels, root=root, images=None)
    inside = (path.name for level in ("*", "train*/*") for path in user_path(str(root)).glob(level))
    as_folders = DATASETS[own.name].in_package or any(name in card["class_names"] for name in inside)
    return replace(own, root=root, name="imagefolder" if as_folders else own.name)


def external(config: DataConfig, own: DataConfig, content: str | None, card: dict[str, Any]) -> tuple[ImageData, str]:
    """All pictures of a data set as one part, under the adapter's classes, and a line on them.

    ``own``, ``content``: what the adapter was trained on. Raises ConfigError where there are other classes.
    """
    found, class_names, decoding = find(config), card["class_names"], Preprocessing.of(card).decoding
    assert found is not None
    if new := [name for name in found.class_names if name not in class_names]:
        raise ConfigError(f"the data's classes are not the adapter's: it has '{new[0]}' in addition")
    images, value_range, told, broken = found.decode(decoding)
    if value_range not in (None, decoding.value_range):
        raise ConfigError("the images have more than 8 bits, those that the trial knows have not: save them with 8")
    labels = np.array([class_names.index(name) for name in found.class_names])[found.labels]
    ids = np.setdiff1d(np.concatenate([*found.parts.values()]), [*broken])
    told += (f"{len(broken):,} broken files left out",) * bool(broken)
    seen = "whether it was trained on some is not known here, as its own are elsewhere"
    with contextlib.suppress(ConfigError):
        known = content is not None and known_content(own, fetch=False) == content
        if known and (keys := found.keys) is not None and (of_ours := (ours := load_data(own)).keys) is not None:
            seen = f"it was trained on {np.isin(keys[ids], of_ours[ours.splits['train']]).sum():,} of them"
    lacking = [name for label, name in enumerate(class_names) if label not in labels[ids]]
    of = f"of {len(class_names) - len(lacking)} of its {len(class_names)} classes"
    of += f" (none of {', '.join(lacking[:3])}{', ...' if len(lacking) > 3 else ''})" if lacking else ""
    passed = [f"passed over: {', '.join(found.passed_over)}"] if found.passed_over else []
    line = "; ".join([f"{len(ids):,} images that are not the trial's own, {of}", seen, *told, *passed])
    same = {**vars(found), "labels": labels, "class_names": class_names, "told": told}
    parts = {"train": ids, EXTERNAL: ids}  # a pack has batches to train on
    return ImageData(**same, images=images, decoding=decoding, splits=parts, fingerprint=found.content), line
