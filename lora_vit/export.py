"""Write a trained trial for other libraries: ``lora-vit export FOLDER --format FORMAT --out DIR``."""

import argparse
import tempfile
from importlib.util import find_spec
from pathlib import Path

from lora_vit.cli import add_trial, completed_trial, main
from lora_vit.config.rules import one_of
from lora_vit.errors import ConfigError, RecordError
from lora_vit.records import RECORD

FORMATS: dict[str, tuple[tuple[str, ...], str]] = {  # the libraries that write and read each, and what opens it
    "peft": (("peft", "transformers"), "peft.PeftModel.from_pretrained(MODEL_OF_BASE, {0!r})"),
    "hf": (("transformers",), "transformers.pipeline('image-classification', {0!r})"),
    "timm": (("timm",), "timm.create_model('local-dir:{0}', pretrained=True)"),
    "onnx": (("onnx", "onnxscript", "onnxruntime"), "onnxruntime.InferenceSession('{0}/model.onnx')"),
    "torch_export": ((), "torch.export.load('{0}/model.pt2').module()"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_trial(parser, devices=("cpu",))
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write, which is not there yet")


def export(folder: str | Path, form: str, out: str | Path, weights: str | None = None) -> list[str]:
    """Write, let the other library load what was written, compare its logits with the trial's; only then keep it.

    ``folder``: also :func:`~lora_vit.save_adapter`'s, with ``weights``. ``form``: one of FORMATS. Returns the kinds of
    pictures that the other library's own reader prepares otherwise. The rest as of :func:`.evaluate.evaluate`.
    """
    one_of("--format", form, [*FORMATS])
    if missing := [package for package in FORMATS[form][0] if find_spec(package) is None]:
        raise RecordError(f"--format {form} needs {', '.join(missing)}: pip install 'lora_vit[{form}]'")
    if (out := Path(out)).exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecordError(f"--out {out} is there already: give a new folder")
    is_trial = not Path(folder, "adapter.json").is_file() or Path(folder, RECORD).exists()  # else save_adapter's
    folder, _, config = completed_trial(folder, weights, "cpu") if is_trial else (Path(folder), None, None)
    from lora_vit import interop
    from lora_vit.trained import TrainedModel, base_of_saved

    trained = TrainedModel(folder, config.model if config else base_of_saved(folder, weights), "cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as place:
        written = Path(place, out.name)
        written.mkdir()
        try:
            interop.write(form, trained, written)
            trained.compare(interop.opened(form, written), f"{folder}: the export")
        except (ConfigError, RecordError, OSError):
            raise
        except Exception as error:  # of the other library: torch's exporters do not take every model
            first = str(error).strip().partition("\n")[0][:200]
            what = f"cannot be written for {trained.model.name} ({type(error).__name__}: {first})"
            raise ConfigError(f"--format {form} {what}: give another format") from error
        for file in filter(Path.is_file, written.rglob("*")):  # some libraries write for their owner alone
            file.chmod(written.stat().st_mode & 0o666)
        written.replace(out)
    if (how := trained.preprocessing) is None:
        print("note: the export does not say how pictures are prepared: prepare them as in your own loop")
    if how is None or form in ("onnx", "torch_export"):
        return []
    if how.decoding.size not in (None, how.image_size):  # others resize once, drop transparency and know no range
        return ["most"]
    return ["transparent"] * (how.decoding.background is not None) + ["deep"] * (how.decoding.value_range is not None)


def run(args: argparse.Namespace) -> int:
    out, odd = str(args.out), export(args.folder, args.format, args.out, args.weights)
    print(f"{FORMATS[args.format][1].format(out)} opens it (docs/interop.md)")
    if odd:
        what = f"its own reader prepares {' and '.join(odd)} pictures otherwise than the trial"
        print(f"{what}: give it what lora_vit.preprocessing({out!r})(FILE) returns")
    return 0


if __name__ == "__main__":
    main("export")
