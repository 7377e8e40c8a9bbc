"""A trained trial in the files of PEFT, HF transformers, timm, ONNX and torch.export, and their logits from these.

Each format has a writer, which returns the lines that load its files, and a reader, which uses the other library alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lora_vit.build import ModelFactory
from lora_vit.config import ConfigError, TrialConfig
from lora_vit.data.augment import IMAGENET_MEAN, IMAGENET_STD
from lora_vit.lora.adapter import SIZES, Adapter, bind, merged_state_dict, put_on, read_adapter
from lora_vit.models.names import timm_name, translate

OPSET = 20
"""Of ONNX: the first with GELU as one operator."""


@dataclass(frozen=True)
class Trial:
    """A trial on the CPU, in fp32.

    Attributes:
        adapter: what was trained.
        base: the weights without it, under the backbone's names, without head.
        adapted: base and adapter apart, as it was trained.
        merged: the backbone's own class, with the adapter in its weights.
        about: class names, image size, mean, std, and ``crop``: whether images are cropped to a square.
    """

    adapter: Adapter
    base: dict[str, Tensor]
    adapted: nn.Module
    merged: nn.Module
    about: dict[str, Any]


def open_trial(folder: Path, config: TrialConfig) -> Trial:
    """Read a trial's adapter and bind it to its base. Raises AdapterError where they do not belong together."""
    adapter = read_adapter(folder)
    names = adapter.card["class_names"]
    factory = ModelFactory(config, len(names), torch.device("cpu"), torch.float32)
    bind(adapter, factory.base)
    if factory.note:
        print(factory.note)
    base = {name: t.clone() for name, t in factory.original.state_dict().items()}
    merged = VisionTransformer(**{key: factory.base[key] for key in SIZES}, num_classes=len(names))
    merged.load_state_dict(merged_state_dict(base, adapter))
    put_on(factory.original, adapter)
    about = {"class_names": names, "image_size": factory.base["image_size"], "mean": IMAGENET_MEAN, "std": IMAGENET_STD}
    about["crop"] = adapter.card["decoded_size"] is not None
    return Trial(adapter, base, factory.original.eval(), merged.eval(), about)


def hf_model(trial: Trial, state: dict[str, Tensor]) -> Any:
    """HF's classifier with the weights of a state dict under the backbone's names, and the trial's head.

    Raises:
        ConfigError: HF has no class with such parts.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    head, about = _head(trial), trial.about
    state = {name: t for name, t in state.items() if timm_name(name).split(".")[0] not in ("head", "heads")}
    found = {timm_name(name): t for name, t in state.items()}
    kind = "ViT" if "blocks.0.ls1.gamma" not in found else "Dinov2WithRegisters" if "reg_token" in found else "Dinov2"
    width, _, patch, _ = found["patch_embed.proj.weight"].shape
    mlp = found["blocks.0.mlp.fc1.weight"].shape[0]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=len([name for name in found if name.endswith(".norm1.weight")]),
        num_attention_heads=trial.adapter.card["base"]["num_heads"],
        image_size=about["image_size"],
        patch_size=patch,
        layer_norm_eps=next(m.eps for m in trial.merged.modules() if isinstance(m, nn.LayerNorm)),
        id2label=dict(enumerate(about["class_names"])),
        label2id={name: i for i, name in enumerate(about["class_names"])},
        **({"intermediate_size": mlp} if kind == "ViT" else {"mlp_ratio": mlp / width}),
        **({"num_register_tokens": found["reg_token"].shape[1]} if "reg_token" in found else {}),
    )
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("classifier.") and "mask_token" not in n}
    translated, _ = translate(state, own)
    odd = sorted({*translated} ^ {*own})
    if odd or getattr(trial.merged, "global_pool", "token") != "token":
        what = f"parts as {odd[0]}" if odd else "such a pooling"
        raise ConfigError(f"HF's {kind} has no {what}: give --format timm, onnx or torch_export")
    weight = head.weight
    if kind != "ViT":  # its classifier reads the mean of the patches as well
        weight = torch.cat([weight, torch.zeros_like(weight)], 1)
    model.load_state_dict({**translated, "classifier.weight": weight, "classifier.bias": head.bias}, strict=False)
    return model


def _head(trial: Trial) -> nn.Linear:
    """The classifier's linear layer."""
    return next(m for name, m in reversed(list(trial.merged.named_modules())) if isinstance(m, nn.Linear))


def _save_hf(trial: Trial, state: dict[str, Tensor], out: Path) -> Any:
    """HF's model of a state dict, saved together with its image processor."""
    from transformers import ViTImageProcessor

    model = hf_model(trial, state)
    model.save_pretrained(out)
    square = {"height": trial.about["image_size"], "width": trial.about["image_size"]}
    cropped = {"size": {"shortest_edge": square["height"]}, "do_center_crop": True, "crop_size": square}
    ViTImageProcessor(
        **(cropped if trial.about["crop"] else {"size": square}),
        image_mean=list(trial.about["mean"]),
        image_std=list(trial.about["std"]),
        resample=2,  # bilinear
        do_convert_rgb=True,
    ).save_pretrained(out)
    return model


def write_hf(trial: Trial, out: Path) -> str:
    """A folder for ``AutoModelForImageClassification`` and ``AutoImageProcessor``."""
    _save_hf(trial, trial.merged.state_dict(), out)
    return 'from transformers import pipeline\nclassify = pipeline("image-classification", "DIR")'


def read_hf(out: Path, images: Tensor) -> Tensor:
    """Logits of what :func:`write_hf` wrote."""
    from transformers import AutoModelForImageClassification

    return AutoModelForImageClassification.from_pretrained(out)(images).logits


def timm_model(trial: Trial, state: dict[str, Tensor], out: Path) -> None:
    """Write timm's folder, ``config.json`` and ``model.safetensors``, with weights under the backbone's names."""
    import timm

    about, base = trial.about, trial.adapter.card["base"]
    sizes = {
        "img_size": about["image_size"],
        "patch_size": base["patch_size"],
        "embed_dim": base["hidden_dim"],
        "depth": base["num_layers"],
        "num_heads": base["num_heads"],
        "mlp_ratio": base["mlp_dim"] / base["hidden_dim"],
    }
    model = timm.create_model("vit_base_patch16_224", **sizes, num_classes=len(about["class_names"]))
    own = {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}
    translated, _ = translate({n: t for n, t in state.items() if not n.startswith("heads.")}, own)
    head = _head(trial)
    model.load_state_dict({**translated, "head.weight": head.weight, "head.bias": head.bias})
    size, names = about["image_size"], about["class_names"]
    shown = {"mean": about["mean"], "std": about["std"], "interpolation": "bilinear", "input_size": (3, size, size)}
    shown |= {"crop_pct": 1.0, "crop_mode": "center" if about["crop"] else "squash"}
    described = {"pretrained_cfg": shown, "label_names": names}
    timm.models.save_for_hf(model, str(out), described, sizes, safe_serialization=True)


def write_timm(trial: Trial, out: Path) -> str:
    """A folder for ``timm.create_model``."""
    timm_model(trial, trial.merged.state_dict(), out)
    return 'import timm\nmodel = timm.create_model("local-dir:DIR", pretrained=True)'


def read_timm(out: Path, images: Tensor) -> Tensor:
    """Logits of what :func:`write_timm` wrote."""
    import timm

    return timm.create_model(f"local-dir:{out}", pretrained=True).eval()(images)


def write_peft(trial: Trial, out: Path) -> str:
    """An adapter folder for PEFT, with the base that it belongs to beside it."""
    import peft

    lora = trial.adapter.card["lora"]
    if lora["method"] != "lora" or lora["bias"] != "none":
        what = f"lora={lora['method']}" if lora["method"] != "lora" else f"lora.bias={lora['bias']}"
        raise ConfigError(f"{what} trains more than adapters, which PEFT's files hold: give --format hf")
    base = _save_hf(trial, trial.base, out / "base")
    modules = {timm_name(name): name.removesuffix(".weight") for name in base.state_dict()}
    tensors, scaling = trial.adapter.tensors, trial.adapter.scaling
    state = {f"base_model.model.classifier.{name}": t for name, t in base.classifier.state_dict().items()}
    targets = []
    for name, weight, third in trial.adapter.places():
        part = timm_name(weight) if third is None else timm_name(weight).replace("qkv", "qkv"[third])
        targets.append(modules[part])
        state |= {f"base_model.model.{modules[part]}.lora_{m}.weight": tensors[f"{name}.lora_{m}"] for m in "AB"}
    config = peft.LoraConfig(
        r=lora["rank"],
        lora_alpha=scaling * lora["rank"],
        lora_dropout=lora["dropout"],
        target_modules=targets,
        modules_to_save=["classifier"],
    )
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, state)
    model.save_pretrained(str(out))
    (out / "README.md").unlink(missing_ok=True)  # a form to be filled in
    return (
        "from peft import PeftModel\nfrom transformers import AutoModelForImageClassification\n"
        'model = PeftModel.from_pretrained(AutoModelForImageClassification.from_pretrained("DIR/base"), "DIR")'
    )


def read_peft(out: Path, images: Tensor) -> Tensor:
    """Logits of what :func:`write_peft` wrote."""
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    base = AutoModelForImageClassification.from_pretrained(out / "base")
    return PeftModel.from_pretrained(base, out).eval()(images).logits


def write_onnx(trial: Trial, out: Path) -> str:
    """``model.onnx`` for any number of images, with class names and preprocessing in its metadata."""
    example = torch.zeros(2, 3, *2 * [trial.about["image_size"]])
    program = torch.onnx.export(
        trial.merged,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props["lora_vit"] = json.dumps(trial.about)
    program.save(out / "model.onnx")
    return 'import onnxruntime\nsession = onnxruntime.InferenceSession("DIR/model.onnx")'


def read_onnx(out: Path, images: Tensor) -> Tensor:
    """Logits of what :func:`write_onnx` wrote."""
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_torch_export(trial: Trial, out: Path) -> str:
    """``model.pt2`` for any number of images, with class names and preprocessing as an extra file."""
    example = torch.zeros(2, 3, *2 * [trial.about["image_size"]])
    program = torch.export.export(trial.merged, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(program, out / "model.pt2", extra_files={"lora_vit.json": json.dumps(trial.about)})
    return 'import torch\nmodel = torch.export.load("DIR/model.pt2").module()'


def read_torch_export(out: Path, images: Tensor) -> Tensor:
    """Logits of what :func:`write_torch_export` wrote."""
    return torch.export.load(out / "model.pt2").module()(images)


WRITERS: dict[str, tuple[Callable[[Trial, Path], str], Callable[[Path, Tensor], Tensor]]] = {
    "peft": (write_peft, read_peft),
    "hf": (write_hf, read_hf),
    "timm": (write_timm, read_timm),
    "onnx": (write_onnx, read_onnx),
    "torch_export": (write_torch_export, read_torch_export),
}
