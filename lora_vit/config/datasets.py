"""The data sets by name: the one table that says what each is before any of its files is looked at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataSet:
    """What is known of a data set.

    Attributes:
        loader: module of ``lora_vit/data`` whose ``find`` lists its images.
        in_package: a Python package brings the images, so there is nothing to download, and its version tells which.
        always: parts (``val``, ``test``) that it has of its own, so no fraction of ``train`` becomes them.
        perhaps: parts that its folder may have of its own; a fraction of ``train`` becomes what it lacks.
        one_size: all images have one size that never changes, so ``data.cache_size`` has no effect.
        official_val: it has a further set of labelled images that ``data.official_val`` adds.
    """

    loader: str
    in_package: bool = False
    always: tuple[str, ...] = ()
    perhaps: tuple[str, ...] = ()
    one_size: bool = False
    official_val: bool = False


DATASETS = {
    "tiny_imagenet": DataSet("tiny_imagenet", official_val=True),
    "digits": DataSet("digits", in_package=True, one_size=True),
    "cifar10": DataSet("cifar", always=("test",), one_size=True),
    "cifar100": DataSet("cifar", always=("test",), one_size=True),
    "imagefolder": DataSet("folder", perhaps=("val", "test")),
    "fake": DataSet("digits", in_package=True),
}
