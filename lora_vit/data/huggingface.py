"""Data sets of Hugging Face's: from the hub, or such files in a folder, read by the ``datasets`` library."""

from pathlib import Path
from typing import Any

from lora_vit.data.dataset import Found, Wanted
from lora_vit.data.files import digests_of
from lora_vit.data.items import Sets, found_from
from lora_vit.data.table import column, part_of
from lora_vit.errors import ConfigError, UserError, one_line


def find(wanted: Wanted) -> Found | None:
    """The data set in ``root``, by its files, or else ``dataset`` of the hub, fetched once. Raises ConfigError."""
    identity, root = [wanted.dataset, wanted.image_column, wanted.label_column], wanted.root
    if root != Path():
        names = sorted(str(path.relative_to(root)) for path in root.rglob("[!.]*") if path.is_file())
        if (digests := digests_of(root, names, wanted.cache_dir, wanted.fetch)) is None:
            return None
        identity += [str(root), *names, digests.tobytes().hex()]
    elif not wanted.dataset:
        raise ConfigError("data.dataset has no value: give NAME[:CONFIG][@REVISION] of the hub, or data.root=DIR")
    return found_from(lambda: _sets(wanted), wanted, repr(identity))


def _sets(wanted: Wanted) -> Sets:
    """The parts, as pairs of a file's bytes (or its path) and a label; the classes, and the revision of the hub's."""
    name, _, revision = (wanted.dataset or "").partition("@")
    name, _, config = name.partition(":")
    folder, source = wanted.root, None
    try:
        import datasets
        from huggingface_hub import snapshot_download

        if folder == Path():
            folder = Path(snapshot_download(name, repo_type="dataset", revision=revision or None))
            source = f"{name}@{folder.name}"
        if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
            made: Any = datasets.load_from_disk(folder)
        else:
            made = datasets.load_dataset(str(folder), config or None, streaming=True)
        splits: dict[str, Any] = made if isinstance(made, dict) else {"train": made}
        features = next(iter(splits.values())).features or {}

        def the(what: str, given: str | None, kind: str) -> str:
            own = [] if given else [name for name, of in features.items() if type(of).__name__ == kind]
            return column(what, given, own or list(features), wanted.dataset or str(folder))

        image, label = the("image", wanted.image_column, "Image"), the("label", wanted.label_column, "ClassLabel")
        as_files = {split: rows.cast_column(image, datasets.Image(decode=False)) for split, rows in splits.items()}
    except ImportError as error:
        raise ConfigError(f"data=huggingface needs {error.name}: pip install 'lora_vit[datasets]'") from None
    except UserError:
        raise
    except Exception as error:  # of the files, the network, the hub or its library
        remedy = "check name, CONFIG and network, or give a folder with Parquet, Arrow or tar files as data.root"
        raise ConfigError(f"{wanted.dataset or folder} cannot be read ({one_line(error)}): {remedy}") from None
    parts: dict[str, Any] = {}
    for split, rows in as_files.items():
        pairs = ((row[image]["bytes"] or row[image]["path"], row[label]) for row in rows.select_columns([image, label]))
        part = part_of(split)
        parts[part or split] = pairs if part else [(b"", None)]  # a part without labels is left out, with a line
    return parts, getattr(features[label], "names", None), source
