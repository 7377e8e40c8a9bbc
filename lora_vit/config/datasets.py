"""The data sets by name: the one table that says what each is before any of its files is looked at."""

from typing import NamedTuple

TABLE = ("labels", "images", "image_column", "label_column", "split_column")
OPTIONAL = ("official_val", *TABLE, "dataset", "target")  # settings that only some data sets read


class DataSet(NamedTuple):
    """What is known of a data set; its parts are ``val`` and ``test``."""

    loader: str  # module of ``lora_vit/data`` whose ``find`` lists its images
    needs: tuple[str, ...] = ("root",)  # settings that must have a value, unless a package brings the images
    reads: tuple[str, ...] = ()  # those of OPTIONAL that it reads
    in_package: bool = False  # a Python package brings the images: nothing to download, its version tells which
    always: tuple[str, ...] = ()  # parts that it has of its own, so no fraction of ``train`` becomes them
    perhaps: tuple[str, ...] = ("val", "test")  # parts that it may have; a fraction of ``train`` becomes what it lacks
    one_size: bool = False  # all images have one size that never changes, and neither transparency nor deep pixels

    def unread(self) -> list[str]:
        """Settings that have no effect on it."""
        keys = [f"{part}_fraction" for part in self.always] + [key for key in OPTIONAL if key not in self.reads]
        keys += ["cache"] * (self.one_size or self.in_package)  # whose images are in memory
        return [f"data.{key}" for key in keys + ["cache_size", "background", "value_range"] * self.one_size]


DATASETS = {
    "tiny_imagenet": DataSet("tiny_imagenet", reads=("official_val",), perhaps=()),
    "digits": DataSet("digits", in_package=True, perhaps=(), one_size=True),
    "cifar10": DataSet("sets", always=("test",), perhaps=(), one_size=True),
    "cifar100": DataSet("sets", always=("test",), perhaps=(), one_size=True),
    "imagefolder": DataSet("folder"),
    "table": DataSet("table", needs=("labels",), reads=TABLE),
    "torchvision": DataSet("sets", needs=("root", "dataset"), reads=("dataset",)),
    "huggingface": DataSet("huggingface", needs=(), reads=("dataset", "image_column", "label_column")),
    "custom": DataSet("sets", needs=("target",), reads=("target",)),
    "fake": DataSet("digits", in_package=True, perhaps=()),
}
