"""A trained trial in the files of PEFT, HF transformers, timm, ONNX and torch.export, and its logits from these."""

import copy
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_vit import randomness
from lora_vit.config import ADAPTED, SIZES
from lora_vit.data.preprocessing import ABOUT, preprocessing
from lora_vit.errors import ConfigError, one_line
from lora_vit.lora.adapter import Adapter, put_on
from lora_vit.lora.backbones import Place, head_name, last_layer, places_of, sizes_of, trunk_state
from lora_vit.models.names import timm_name, translate
from lora_vit.trained import TrainedModel

SAME_INPUT = 0.05  # of a normalised pixel, on average: three of 255 levels, where others round once more or resize so


def write(form: str, trained: TrainedModel, out: Path) -> None:
    """Write a trial into a folder. Raises ConfigError for a model that the other library lacks, or that one's error."""
    about = json.dumps(trained.about)
    (out / ABOUT).write_text(about, encoding="utf-8")
    if form == "peft":
        return _write_peft(trained, out)
    if form in ("hf", "timm"):
        return _save(trained, (_hf_model if form == "hf" else _timm_model)(trained, trained.merged), out)
    model, side = trained.merged, trained.preprocessing.image_size
    images = torch.zeros(2, 3, side, side)  # of one, a graph would take the number for constant
    if form == "torch_export":
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        return torch.export.save(exported, out / "model.pt2", extra_files={ABOUT: about})
    for module in model.modules():
        if hasattr(module, "fused_attn"):  # torch's exporter loses the strides of the one with a mask (BEiT's)
            module.fused_attn = False
    options: Any = {"input_names": ["images"], "output_names": ["logits"], "dynamic_shapes": ({0: "batch"},)}
    # opset 20 is the first with GELU as one operator
    program: Any = torch.onnx.export(model, (images,), dynamo=True, verbose=False, opset_version=20, **options)
    program.model.metadata_props["lora_vit"] = about
    program.save(out / "model.onnx")


def opened(form: str, out: Path) -> tuple[Callable[[Tensor], Tensor], Callable[[Path], np.ndarray]]:
    """What the other library makes of images, [B, C], and of a picture file, float32 [3, S, S].

    By the files that :func:`write` left and nothing else, and by the lines in docs/interop.md.
    """
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        return lambda x: torch.tensor(session.run(None, {"images": x.numpy()})[0]), preprocessing(out / "model.onnx")
    if form == "torch_export":
        return torch.export.load(out / "model.pt2").module(), preprocessing(out / "model.pt2")
    place = out / "base" if form == "peft" else out
    described = json.loads((place / "config.json").read_text(encoding="utf-8"))
    if "architectures" in described:  # HF's
        from transformers import AutoImageProcessor, AutoModelForImageClassification
        from transformers.image_utils import load_image

        model: Any = AutoModelForImageClassification.from_pretrained(place)
        processor: Any = AutoImageProcessor.from_pretrained(place)

        def prepared(file: Path) -> np.ndarray:
            return processor(load_image(str(file)), return_tensors="np")["pixel_values"][0]
    else:
        import timm

        model = timm.create_model(f"local-dir:{place}", pretrained=True).eval()
        transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(described["pretrained_cfg"]))

        def prepared(file: Path) -> np.ndarray:
            return transform(ImageOps.exif_transpose(Image.open(file)).convert("RGB")).numpy()

    if form == "peft":
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, out).eval()
    return lambda images: getattr(found := model(images), "logits", found), prepared


def prepared_otherwise(trained: TrainedModel, prepared: Callable[[Path], np.ndarray]) -> list[str]:
    """Kinds of pictures that the other library's own reader prepares differently from the trial."""
    how, odd = trained.preprocessing, []
    side = 2 * max(how.image_size, how.decoding.size or 0)
    drawn = []
    for grain in (1, side // 16 + 1, side // 4 + 1):  # pixels of a random grain: photos have shapes too
        rows, columns = (-(-pixels // grain) for pixels in (side, 3 * side))
        colours = randomness.uniforms(np.arange(rows * columns), 4, "pictures", grain).reshape(rows, columns, 4)
        drawn.append(colours.repeat(grain, 0).repeat(grain, 1)[:side, : 3 * side])
    wide = np.mean(drawn, 0)  # [side, 3 * side, 4] in [0, 1)
    image = Image.fromarray((wide * 256).astype(np.uint8))
    rgb, small = image.convert("RGB"), (0, 0, how.image_size, how.image_size)
    kinds = {"wide": rgb, "small": rgb.crop(small), "sideways": rgb.copy(), "grey": rgb.convert("L"),
             "transparent": image}  # fmt: skip
    kinds["sideways"].getexif()[ExifTags.Base.Orientation] = 6
    if how.decoding.value_range is not None:
        low, high = how.decoding.value_range
        kinds["deep"] = Image.fromarray((low + wide[..., 0] * (high - low)).astype(np.float32))
    with tempfile.TemporaryDirectory() as place:
        for kind, picture in kinds.items():
            file = Path(place, f"{kind}.tiff" if kind == "deep" else f"{kind}.png")
            picture.save(file, exif=picture.getexif())
            if not np.abs(prepared(file) - how(file)).mean() <= SAME_INPUT:
                odd.append(kind)
    return odd


def _hf_model(trained: TrainedModel, source: nn.Module) -> Any:
    """HF's classifier with the weights of ``source``. Raises ConfigError where HF has no class with such parts."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    state, classes = trunk_state(source), trained.class_names
    found = {timm_name(name): t for name, t in state.items()}
    kind = "ViT" if "blocks.0.ls1.gamma" not in found else "Dinov2WithRegisters" if "reg_token" in found else "Dinov2"
    width, _, _, patch = found["patch_embed.proj.weight"].shape
    mlp = found["blocks.0.mlp.fc1.weight"].shape[0]
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith(".norm1.weight") for name in found),
        num_attention_heads=next(m.num_heads for m in source.modules() if hasattr(m, "num_heads")),
        image_size=trained.preprocessing.image_size,
        patch_size=patch,
        qkv_bias="blocks.0.attn.qkv.bias" in found,
        layer_norm_eps=next((m.eps for m in source.modules() if isinstance(m, nn.LayerNorm)), 1e-6),
        id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
        **({"intermediate_size": mlp} if kind == "ViT" else {"mlp_ratio": mlp // width}),
        **({"num_register_tokens": found["reg_token"].shape[1]} if "reg_token" in found else {}),
    )
    model = getattr(transformers, f"{kind}ForImageClassification")(config).eval()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("classifier.") and "mask_token" not in n}
    translated, _ = translate(state, own)
    shapes, own_shapes = ({(name, t.shape) for name, t in tensors.items()} for tensors in (translated, own))
    if odd := sorted(name for name, _ in shapes ^ own_shapes):
        name = f"{trained.config.model.name} ({kind} differs in {odd[0]})"
        raise ConfigError(f"HF has no {name}: give --format timm, onnx or torch_export")
    head: Any = last_layer(source)  # Dinov2's classifier reads the mean of the patches as well
    weight = head.weight if kind == "ViT" else torch.cat([head.weight, torch.zeros_like(head.weight)], 1)
    model.load_state_dict({**translated, "classifier.weight": weight, "classifier.bias": head.bias}, strict=False)
    return model


def _timm_model(trained: TrainedModel, source: nn.Module) -> Any:
    """timm's model with the weights of ``source``: itself, or a ViT with torchvision's sizes."""
    if trained.config.model.library != "torchvision":
        return source
    import timm

    size, patch, depth, heads, width, mlp = (trained.adapter.card["base"][key] for key in SIZES)
    sizes = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    head: Any = last_layer(source)
    model = timm.create_model("vit_base_patch16_224", **sizes, mlp_ratio=mlp / width, num_classes=head.out_features)
    translated, _ = translate(trunk_state(source), trunk_state(model))
    model.load_state_dict({**translated, "head.weight": head.weight, "head.bias": head.bias})
    return model.eval()


def _write_peft(trained: TrainedModel, out: Path) -> None:
    """The adapter, and under ``base/`` the model that it is for: HF's, or timm's where the backbone is timm's."""
    import peft

    lora, scaling = (trained.adapter.card[key] for key in ("lora", "effective_scaling"))
    adapted, dora = lora["method"] in ADAPTED, lora["method"] == "dora"
    if not adapted or lora["bias"] != "none":
        what = f"lora.bias={lora['bias']}" if adapted else f"lora={lora['method']}"
        raise ConfigError(f"{what} trains more than adapters, which PEFT's files hold: give --format timm or hf")
    plain = copy.deepcopy(trained.merged)  # with the base's own weights again
    plain.load_state_dict(trunk_state(trained.factory.original), strict=False)
    of_torchvision = trained.config.model.library == "torchvision"
    base = (_hf_model if of_torchvision else _timm_model)(trained, plain)
    _save(trained, base, out / "base")
    layers = _adapters_by_layer(trained, base)
    r = next(len(own["A"]) for parts in layers.values() for _, own in parts)
    heads = [name for name, module in base.named_children() if isinstance(module, nn.Linear)]
    state = {name: t for name, t in base.state_dict().items() if name.split(".")[0] in heads}
    for layer, parts in layers.items():
        lora_B = torch.zeros(base.get_submodule(layer).out_features, len(parts) * r)
        magnitude = base.get_submodule(layer).weight.detach().norm(dim=1)
        for i, (row, own) in enumerate(parts):
            rows = slice(row, row + len(own["B"]))
            lora_B[rows, i * r : (i + 1) * r], magnitude[rows] = own["B"], own.get("magnitude", magnitude[rows])
        state |= {f"{layer}.lora_A.weight": torch.cat([own["A"] for _, own in parts]), f"{layer}.lora_B.weight": lora_B}
        if dora:
            state[f"{layer}.lora_magnitude_vector"] = magnitude
    wider = {layer: len(parts) * r for layer, parts in layers.items() if len(parts) > 1}
    patterns = {"rank_pattern": wider, "alpha_pattern": {layer: scaling * rank for layer, rank in wider.items()}}
    settings = {"r": r, "lora_alpha": scaling * r, "lora_dropout": lora["dropout"], "use_dora": dora, **patterns}
    config = peft.LoraConfig(**settings, target_modules=list(layers), modules_to_save=heads)
    model = peft.get_peft_model(base, config)
    peft.set_peft_model_state_dict(model, {f"base_model.model.{name}": t for name, t in state.items()})
    model.save_pretrained(str(out), save_embedding_layers=False)  # "auto" looks for a vocabulary
    (out / "README.md").unlink(missing_ok=True)  # a form to be filled in


def _adapters_by_layer(trained: TrainedModel, base: Any) -> dict[str, list[tuple[int, dict[str, Tensor]]]]:
    """By linear layer of the base: of each adapter in it the first row of its output, and its tensors (``A``, ...)."""
    modules = {timm_name(name): name.removesuffix(".weight") for name in base.state_dict()}
    found: dict[str, list[tuple[int, dict[str, Tensor]]]] = {}
    for name, place, part in trained.adapter.places(trained.merged):
        fused = len(place.names) > 1
        if fused and place.bias_apart:
            raise ConfigError(
                f"PEFT never calls {place.layer} of {trained.about['model']}, whose bias is apart "
                "(docs/peft_pitfalls.md): give --format timm, or train without q, k and v"
            )
        tensors, start = trained.adapter.tensors, f"{name}.lora_"
        own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
        whole, alone = timm_name(place.weight), _alone(place, part)
        row = part * len(own["B"]) if alone not in modules else 0
        found.setdefault(modules.get(alone) or modules[whole], []).append((row, own))
    return found


def _alone(place: Place, part: int) -> str:
    """timm's name of the weight that a place's adapter is for, where q, k and v have weights of their own."""
    whole = timm_name(place.weight)
    return whole.replace("qkv", "qkv"[part]) if len(place.names) > 1 else whole


def load_peft(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put PEFT's LoRA adapters, of HF's or timm's ViT, and their head on a plain model, in place; returns the model.

    One of a fused q, k, v becomes one of each. The files do not say which weights they are for: give those. Raises
    ConfigError where they hold anything else, or are for other layers; the model is left as it was.
    """
    sizes_of(model)
    try:
        config = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
        state = load_file(Path(folder, "adapter_model.safetensors"))
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder} is no adapter of PEFT's: give what it saved ({one_line(error)})") from None
    slots: dict[str, Any] = {
        _alone(place, part): (name, (target, block), place.sizes(model))
        for block, places in enumerate(places_of(model).values()) for place in places
        for part, (target, name) in enumerate(place.names.items())
    }  # fmt: skip
    alphas = {**config.get("alpha_pattern", {}), ".*": config["lora_alpha"]}
    tensors, pairs, found, scaling = {}, {}, set(), 0.0
    for key, A in state.items():
        layer, _, leaf = key.removeprefix("base_model.model.").partition(".lora_")
        whole, B = timm_name(f"{layer}.weight"), state.get(key.replace(".lora_A.", ".lora_B."), A)
        if re.fullmatch(r"(classifier|head)\.(weight|bias)", layer):
            tensors[f"{head_name(model)}.{layer.partition('.')[2]}"] = A
        elif leaf == "A.weight":
            alpha = next(alphas[one] for one in alphas if re.fullmatch(rf"(.*\.)?({one})", layer))
            own = alpha / (len(A) ** 0.5 if config.get("use_rslora") else len(A))
            scaling = scaling or own
            for part, rows in zip("qkv", B.chunk(3), strict=True) if ".qkv." in whole else [("qkv", B)]:
                name, where, sizes = slots.get(whole.replace("qkv", part), ("", (), ()))
                if (len(rows), *A.shape[1:]) != sizes:
                    raise ConfigError(f"{folder} holds {layer}, which the {type(model).__name__} lacks in this size")
                if (used := rows.any(0) | ~B.any()).any():  # the columns of other parts may lie beside them
                    pairs[name] = A[used], rows[:, used] * (own / scaling)
                    found.add(where)
        elif leaf != "B.weight":
            raise ConfigError(f"{folder} holds {key}: adapters of linear layers and a head alone can be read")
    rank = max(len(A) for A, _ in pairs.values())
    for name, (A, B) in pairs.items():
        more = rank - len(A)
        tensors |= {f"{name}.lora_A": F.pad(A, (0, 0, 0, more)), f"{name}.lora_B": F.pad(B, (0, more))}
    lora = {"method": "lora", "rank": rank, "dropout": config["lora_dropout"], "targets": sorted(dict(found)),
            "blocks": sorted({block for _, block in found})}  # fmt: skip
    put_on(model, Adapter(tensors, {"lora": lora, "effective_scaling": scaling}))
    return model


def _save(trained: TrainedModel, model: Any, out: Path) -> None:
    """Write a model of HF or timm as its library does, with class names and how images are prepared."""
    how, side = trained.preprocessing, trained.preprocessing.image_size
    cropped = how.decoding.size is not None
    if hasattr(model, "pretrained_cfg"):
        from timm.models import save_for_hf

        shown = {key: getattr(how, key) for key in ("mean", "std", "interpolation")}
        shown |= {"input_size": (3, side, side), "crop_pct": 1.0, "crop_mode": "center" if cropped else "squash"}
        described = {"pretrained_cfg": shown, "label_names": trained.class_names}
        return save_for_hf(model, str(out), described, safe_serialization=True)
    from transformers import ViTImageProcessor

    square = {"height": side, "width": side}
    crop = {"size": {"shortest_edge": side}, "do_center_crop": True, "crop_size": square}
    shown = {"image_mean": how.mean, "image_std": how.std, "resample": {"bilinear": 2, "bicubic": 3}[how.interpolation]}
    model.save_pretrained(out)
    ViTImageProcessor(**(crop if cropped else {"size": square}), **shown, do_convert_rgb=True).save_pretrained(out)
