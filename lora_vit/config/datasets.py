"""The data sets by name: the one table that says what each is before any of its files is looked at."""

from typing import NamedTuple


class DataSet(NamedTuple):
    """What is known of a data set; its parts are ``val`` and ``test``."""

    loader: str  # module of ``lora_vit/data`` whose ``find`` lists its images
    in_package: bool = False  # a Python package brings the images: nothing to download, its version tells which
    always: tuple[str, ...] = ()  # parts that it has of its own, so no fraction of ``train`` becomes them
    perhaps: tuple[str, ...] = ()  # parts that its folder may have; a fraction of ``train`` becomes what it lacks
    one_size: bool = False  # all images have one size that never changes, and neither transparency nor deep pixels
    official_val: bool = False  # it has a further set of labelled images that ``data.official_val`` adds

    def unread(self) -> list[str]:
        """Settings that have no effect on it."""
        keys = [f"{part}_fraction" for part in self.always] + ["official_val"] * (not self.official_val)
        keys += ["cache"] * (self.one_size or self.in_package)  # whose images are in memory
        return [f"data.{key}" for key in keys + ["cache_size", "background", "value_range"] * self.one_size]


DATASETS = {
    "tiny_imagenet": DataSet("tiny_imagenet", official_val=True),
    "digits": DataSet("digits", in_package=True, one_size=True),
    "cifar10": DataSet("cifar", always=("test",), one_size=True),
    "cifar100": DataSet("cifar", always=("test",), one_size=True),
    "imagefolder": DataSet("folder", perhaps=("val", "test")),
    "fake": DataSet("digits", in_package=True),
}
