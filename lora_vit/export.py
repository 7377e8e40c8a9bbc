"""Write a trained trial for other libraries: ``python -m lora_vit.export FOLDER --format FORMAT --out DIR``."""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path

from lora_vit.commands import completed_record, recorded_config, trial_parser
from lora_vit.errors import ConfigError, RecordError, run_command

FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "peft": (("peft", "transformers"), "peft.PeftModel.from_pretrained(MODEL_OF_BASE, {0!r})"),
    "hf": (("transformers",), "transformers.pipeline('image-classification', {0!r})"),
    "timm": (("timm",), "timm.create_model('local-dir:{0}', pretrained=True)"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnxruntime.InferenceSession('{0}/model.onnx')"),
    "torch_export": ((), "torch.export.load('{0}/model.pt2').module()"),
}
"""The libraries that write and read each format, and what opens it."""


def export_folder(folder: Path, form: str, out: Path, weights: str | None) -> int:
    """Write, let the other library load what was written, compare its logits with the trial's, and only then keep it.

    Raises:
        RecordError: a library is missing, or ``out`` is there and not empty.
        ConfigError: the format has no such model, or the logits differ.
    """
    libraries, opens = FORMATS[form]
    missing = [package for package in libraries if find_spec(package) is None]
    if missing:
        raise RecordError(f"--format {form} needs {', '.join(missing)}: pip install 'lora_vit[{form}]'")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordError(f"--out {out} is there already: give a new folder")
    config = recorded_config(completed_record(folder), "cpu", weights)
    import torch

    from lora_vit import interop

    trial = interop.open_trial(folder, config, torch.device("cpu"))
    write, read = interop.FORMATS[form]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        written = Path(place, out.name)
        written.mkdir()
        try:
            write(trial, written)
            interop.compare(trial, lambda images: read(written, images), f"{folder}: the export")
        except (ConfigError, RecordError, OSError):
            raise
        except Exception as error:  # of the other library: torch's exporters do not take every model
            first = str(error).strip().partition("\n")[0][:200]
            raise ConfigError(
                f"--format {form} cannot be written for {trial.about['model']} ({type(error).__name__}: {first}): "
                "give another format"
            ) from error
        written.replace(out)
    print(f"{opens.format(str(out))} opens it (docs/interop.md)")
    return 0


def main() -> None:
    """Command-line entry."""
    parser = trial_parser("export", __doc__)
    parser.add_argument("--format", choices=tuple(FORMATS), required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which is not there yet")
    args = parser.parse_args()
    run_command(lambda: export_folder(args.folder, args.format, args.out, args.weights))


if __name__ == "__main__":
    main()
