"""ImageNet's validation images as they are published: in one folder, with a list of their classes."""

from collections.abc import Sequence
from pathlib import Path

from lora_vit.data.files import Listing
from lora_vit.errors import ConfigError
from lora_vit.files import shown

# Kaggle's list, and that of the development kit; in data.root or up to three folders above it.
_LISTS = ("LOC_val_solution.csv", *(f"{kit}ILSVRC2012_validation_ground_truth.txt"
                                    for kit in ("", "data/", "ILSVRC2012_devkit_t12/data/")))  # fmt: skip


def flat_val(top: Path, folder: str, class_names: Sequence[str], files: Listing) -> list[tuple[str, int]]:
    """The images of a ``folder`` of ``top`` with their classes, as class folders have them; none without a list.

    Raises ConfigError where it does not fit the images.
    """
    places = (top, *top.resolve().parents[:3])
    path = next((path for place in places for name in _LISTS if (path := place / name).is_file()), None)
    if path is None:
        return []
    names = files.images(top, folder)
    stems, words = [Path(name).stem for name in names], path.read_text(encoding="utf-8-sig").split()
    if path.name == _LISTS[0]:  # an image and, behind a comma, the class and boxes
        wnids = dict(word.split(",") for word in words if "," in word)
    else:
        from scipy.io import loadmat

        try:
            synsets = loadmat(path.with_name("meta.mat"), squeeze_me=True)["synsets"]
            known = {str(one["ILSVRC2012_ID"]): str(one["WNID"]) for one in synsets}
            wnids = {stem: known[word] for stem, word in zip(stems, words, strict=True)}
        except (OSError, ValueError, LookupError) as error:
            what = f"{shown(path)} does not say the classes of {len(names):,} images in {shown(top / folder)}"
            raise ConfigError(f"{what} ({error!r}): keep meta.mat beside it, and all images") from None
    numbers, found = {name: number for number, name in enumerate(class_names)}, list[tuple[int, str]]()
    for name, stem in zip(names, stems, strict=True):
        if (number := numbers.get(wnids.get(stem, ""))) is None:
            files.skip(f"images of {folder}/ without a class of train/ in {path.name}", name)
        else:
            found.append((number, name))
    return [(name, number) for number, name in sorted(found)]
