"""Write a trained trial for other libraries: ``python -m lora_vit.export FOLDER --format FORMAT --out DIR``."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from lora_vit.commands import completed_record, recorded_config, run_command, trial_parser
from lora_vit.records import RecordError

TOLERANCE = 1e-3
"""Largest difference of a logit, in fp32, relative to the largest logit (or 1): both round each product."""
CHECKED = 5
"""Made images that both sides classify; another number than any graph was traced with."""
NEEDS = {
    "peft": ("peft", "transformers"),
    "hf": ("transformers",),
    "timm": ("timm",),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "torch_export": (),
}
"""The libraries that write and read each format."""


def export_folder(folder: Path, form: str, out: Path, weights: str | None) -> int:
    """Write, let the other library load what was written, compare its logits with the trial's, and only then keep it.

    Raises:
        RecordError: a library is missing, ``out`` is not empty, the format has no such model, or the logits differ.
    """
    missing = [package for package in NEEDS[form] if find_spec(package) is None]
    if missing:
        raise RecordError(f"--format {form} needs {', '.join(missing)}: pip install 'lora_vit[{form}]'")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordError(f"--out {out} is there already: give a new folder")
    config = recorded_config(completed_record(folder), "cpu", weights)
    import torch

    from lora_vit import interop, randomness

    trial = interop.open_trial(folder, config)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        written = Path(place, out.name)
        written.mkdir()
        usage = interop.WRITERS[form][0](trial, written)
        size = trial.about["image_size"]
        images = torch.rand(CHECKED, 3, size, size, generator=randomness.generator("export")) * 4 - 2
        with torch.no_grad():
            ours, theirs = trial.adapted(images), interop.WRITERS[form][1](written, images)
        largest = float((ours - theirs).abs().max())
        print(f"largest logit difference {largest:.2e} on {CHECKED} made images, loaded from the files")
        if not largest <= TOLERANCE * max(1.0, float(ours.abs().max())):
            raise RecordError(f"{folder}: the export differs by {largest:.2e}; nothing written")
        if out.exists():
            out.rmdir()
        written.rename(out)
    print(usage.replace("DIR", str(out)))
    return 0


def main() -> None:
    """Command-line entry."""
    parser = trial_parser("export", __doc__)
    parser.add_argument("--format", choices=tuple(NEEDS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which is not there yet")
    args = parser.parse_args()
    run_command(lambda: export_folder(args.folder, args.format, args.out, args.weights))


if __name__ == "__main__":
    main()
