"""Exports: what other libraries make of the files is what the trial does, and the snippets in docs/interop.md run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import train_together, trial_config
from PIL import ExifTags, Image, ImageOps
from plain_models import SIZES, images, plain_model, randomised, register_small, timm_config, trials_logits
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.models import VisionTransformer

from lora_vit import (
    ConfigError,
    adapter_state_dict,
    interop,
    load_adapter,
    load_peft,
    preprocessing,
    replace_linear_with_lora,
    save_adapter,
    trained,
)
from lora_vit.data.preprocessing import Preprocessing
from lora_vit.export import FORMATS
from lora_vit.lora.adapter import Adapter
from lora_vit.lora.backbones import put_head, timm_model, trunk_state
from lora_vit.lora.layers import LoRAAdapters
from lora_vit.models.names import translate

for package in ("transformers", "timm", "peft", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

pytestmark = [
    # onnxruntime and torch.export leave files to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LARGE = ("trainer.precision=fp32", "optimizer.lr=3e-2")
"""Steps after which the adapters change the logits."""
TIMM = {  # name and settings
    "timm": ("small_vit", "lora.rank=3", "trainer.epochs=2", "lora.targets=[q,v,o,fc2]", "lora.blocks=[1]"),
    "beit": ("small_beit", "lora.rank=2"),
    "eva02": ("small_eva02", "lora.rank=2"),
    "dinov2": ("small_dinov2", "lora.rank=8"),
    "dora of timm": ("small_vit", "lora=dora", "lora.rank=2", "trainer.epochs=2", "lora.targets=[q,v,o,fc2]"),
}


@pytest.fixture(scope="module")
def trial_of(tmp_path_factory):
    """Trials by kind, each trained once."""
    place = tmp_path_factory.mktemp("trials")

    def of(kind: str) -> Path:
        if not (place / kind).exists():
            method = ("lora=dora", "lora.dropout=0.2") if kind == "dora" else ()
            config = trial_config(*LARGE, "lora.rank=3", "lora.alpha=5", *method)
            if kind in TIMM:
                name, *settings = TIMM[kind]
                config = timm_config(*LARGE, *settings, name=name)
            train_together([config], place / kind)
        return place / kind / "0"

    return of


@pytest.fixture(scope="module")
def trial(trial_of) -> Path:
    return trial_of("torchvision")


def peft(folder: Path) -> Any:
    import timm
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    if "architectures" in json.loads((folder / "base" / "config.json").read_text()):
        base = AutoModelForImageClassification.from_pretrained(folder / "base")
    else:
        base = timm.create_model(f"local-dir:{folder}/base", pretrained=True)
    return PeftModel.from_pretrained(base, folder, is_trainable=True)


def modes(folder: Path) -> set[int]:
    return {path.stat().st_mode & 0o777 for path in folder.rglob("*") if path.is_file()}


FILES = ("preprocessor_config.json", "config.json")
EXPORTS = [
    *((kind, form) for kind in ("torchvision", "timm") for form in FORMATS),
    *((kind, "onnx") for kind in ("beit", "eva02")),  # a bias of attention, rotations
    *(("dinov2", form) for form in ("hf", "timm")),  # layer scale, registers
    *(("dora", form) for form in ("peft", "hf")),
    ("dora of timm", "peft"),
]
EXPORTS = [pytest.param(*e, marks=[pytest.mark.slow] if e[1] in ("onnx", "torch_export") else []) for e in EXPORTS]


@pytest.mark.parametrize(("kind", "form"), EXPORTS)
def test_an_export_gives_the_trials_logits(kind, form, trial_of, tmp_path, call):
    folder, side = trial_of(kind), 16 if kind in ("torchvision", "dora") else 32
    code, out, err = call("export", folder, "--format", form, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.search(r"^largest logit difference \d\.\d\de-0\d, 0 of 16 predictions changed on made images$", out, re.M)
    assert str(tmp_path / "out") in out
    expected = trials_logits(folder, images(side))
    # each product is rounded in another order
    torch.testing.assert_close(interop.opened(form, tmp_path / "out")(images(side)), expected, rtol=1e-4, atol=1e-4)
    without = plain_model(folder)
    head = load_file(folder / "adapter.safetensors")
    put_head(without, head)
    with torch.no_grad():
        assert (without(images(side)) - expected).abs().max() > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (tmp_path / "usual").touch()
    assert modes(tmp_path) == {(tmp_path / "usual").stat().st_mode & 0o777}
    if form == "hf":
        prepared, said = (json.loads((tmp_path / "out" / f).read_text()) for f in FILES)
        assert prepared["resample"] == (3 if kind in TIMM else 2)  # bicubic, bilinear
        assert said["model_type"] == ("dinov2_with_registers" if kind == "dinov2" else "vit")


def test_others_may_read_what_the_folder_lets_them(trial, tmp_path, call):
    before = os.umask(0o077)
    try:
        assert call("export", trial, "--format", "peft", "--out", tmp_path / "new" / "peft")[0] == 0
        assert call("merge", trial, "--out", tmp_path / "new" / "m.safetensors")[0] == 0
    finally:
        os.umask(before)
    assert modes(tmp_path) == {0o600}
    assert {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()} == {0o700}


def picture(path: Path) -> Path:
    """Smooth, larger than the model's images, and not square."""
    rows, columns = np.mgrid[0:60, 0:90] / 60
    pixels = np.stack([rows, columns / 1.5, (rows + columns) / 2.5], -1) * 250
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("cropped", [True, False])
def test_class_names_and_preprocessing_travel(cropped, trial, tmp_path, call, monkeypatch):
    """Others' transforms, which round pixels to whole numbers once more, see what predict sees."""
    import timm
    from transformers import pipeline

    if not cropped:
        card = json.loads((trial / "adapter.json").read_text())
        card["preprocessing"]["decoded_size"] = None  # as of a data set whose images have one size
        read_adapter = trained.read_adapter
        monkeypatch.setattr(trained, "read_adapter", lambda folder: Adapter(read_adapter(folder).tensors, card))
    image = picture(tmp_path / "image.png")  # on which bilinear and bicubic hardly differ
    assert call("predict", trial, image, "--top", "4", "--csv", tmp_path / "p.csv")[0] == 0
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    expected = {name: float(p) for _, _, name, p in rows}
    for form in ("hf", "timm"):
        assert call("export", trial, "--format", form, "--out", tmp_path / form)[0] == 0
    found = {one["label"]: one["score"] for one in pipeline("image-classification", str(tmp_path / "hf"))(str(image))}
    assert found == pytest.approx(expected, abs=0.02)
    model = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        p = model(transform(Image.open(image).convert("RGB"))[None]).softmax(-1)[0]
    assert dict(zip(model.pretrained_cfg["label_names"], p.tolist(), strict=True)) == pytest.approx(expected, abs=0.02)


def pictures(side: int, folder: Path) -> dict[str, Path]:
    """Picture files by kind: noise of coarse grains, as photos have shapes, and of fine ones."""
    noise = np.random.default_rng(0).random((side, 3 * side, 4), np.float32)
    image = Image.fromarray((255 * noise).astype(np.uint8))
    coarse = [image.resize((3 * n, n)).resize(image.size, Image.Resampling.NEAREST) for n in (4, 16)]
    image = Image.fromarray(np.mean([*coarse, image], 0).astype(np.uint8))
    rgb = image.convert("RGB")
    kinds = {"wide": rgb, "small": rgb.crop((0, 0, side // 2, side // 2)), "sideways": rgb.copy(),
             "grey": rgb.convert("L"), "transparent": image}  # fmt: skip
    kinds["sideways"].getexif()[ExifTags.Base.Orientation] = 6
    kinds["deep"] = Image.fromarray(np.asarray(kinds["grey"], np.float32) * 16)
    files = {kind: folder / f"{kind}.{'tiff' if kind == 'deep' else 'png'}" for kind in kinds}
    for kind, file in files.items():
        kinds[kind].save(file, exif=kinds[kind].getexif())
    return files


def reader(place: Path) -> Any:
    """The other library's own, from a picture's file to float32 [3, S, S]."""
    import timm
    from transformers import AutoImageProcessor
    from transformers.image_utils import load_image

    described = json.loads((place / "config.json").read_text())
    if "architectures" in described:
        processor: Any = AutoImageProcessor.from_pretrained(place)
        return lambda file: processor(load_image(str(file)), return_tensors="np")["pixel_values"][0]
    transform: Any = timm.data.create_transform(**timm.data.resolve_data_config(described["pretrained_cfg"]))
    return lambda file: transform(ImageOps.exif_transpose(Image.open(file)).convert("RGB")).numpy()


@pytest.mark.parametrize(
    ("form", "changes", "odd"),
    [
        ("hf", {}, "transparent"),
        ("timm", {"decoded_size": None, "background": None}, ""),
        ("peft", {"value_range": [0, 4095]}, "transparent and deep"),
        ("timm", {"decoded_size": 18}, "most"),  # resized twice, as from 256 to 224
        ("torch_export", {"value_range": [0, 4095], "decoded_size": 8}, ""),
    ],
)
def test_which_pictures_others_prepare_otherwise_is_said(form, changes, odd, trial, tmp_path, call, monkeypatch):
    """By their own readers, of picture files; what is prepared by our description is the trial's."""
    adapter = trained.read_adapter(trial)
    card = {**adapter.card, "preprocessing": {**adapter.card["preprocessing"], **changes}}
    monkeypatch.setattr(trained, "read_adapter", lambda folder: Adapter(adapter.tensors, card))
    code, out, err = call("export", trial, "--format", form, "--out", tmp_path / "out")
    assert code == 0, err
    assert re.findall(r"prepares (.*) pictures otherwise", out) == ([odd] if odd else [])
    ours = preprocessing(tmp_path / "out")
    assert ours == Preprocessing.of(card)
    if form == "torch_export":
        return
    theirs, kinds = reader(tmp_path / "out" / "base" if form == "peft" else tmp_path / "out"), pictures(36, tmp_path)
    if ours.decoding.value_range is None:
        del kinds["deep"]
    # of a normalised pixel, on average: three of 255 levels, where others round once more or resize so
    found = {kind for kind, file in kinds.items() if np.abs(theirs(file) - ours(file)).mean() > 0.05}
    assert found == {*odd.split(" and ")} - {""} or (odd == "most" and found >= {"wide", "sideways", "transparent"})


def test_peft_adapts_what_the_trial_adapted(tmp_path, call):
    config = trial_config(*LARGE, "lora.rank=3", "lora.targets=[q,v,fc2]", "lora.blocks=[1]", "lora.scaling=rslora")
    train_together([config], tmp_path)
    assert call("export", tmp_path / "0", "--format", "peft", "--out", tmp_path / "peft")[0] == 0
    model = peft(tmp_path / "peft").eval()
    adapted = {name.partition(".lora_")[0][17:] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {f"vit.layers.1.{part}" for part in ("attention.q_proj", "attention.v_proj", "mlp.fc2")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 + 2  # A and B of each, and the head
    with torch.no_grad():
        found = model.merge_and_unload()(images(16)).logits
    torch.testing.assert_close(found, trials_logits(tmp_path / "0", images(16)), rtol=1e-4, atol=1e-4)


def test_dora_learns_in_peft_as_here(trial_of, tmp_path, call):
    """Output and every gradient, with magnitudes away from the norms and without dropout, in fp32."""
    assert call("export", trial_of("dora"), "--format", "peft", "--out", tmp_path / "peft")[0] == 0
    theirs, ours = peft(tmp_path / "peft").train(), load_adapter(plain_model(trial_of("dora")), trial_of("dora"))
    for module in theirs.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    logits, expected = theirs(images(16)).logits, ours.eval()(images(16))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    for output in (logits, expected):
        output.log_softmax(-1)[:, 0].sum().backward()
    found = {name: p.grad for name, p in theirs.named_parameters() if ".lora_" in name}
    places = {"out_proj": "attention.o_proj", "0": "mlp.fc1", "3": "mlp.fc2"}
    places |= {part: f"attention.{part}_proj" for part in "qkv"}
    ends = {"lora_A": "default.weight", "lora_B": "default.weight", "lora_magnitude": "vector.default.weight"}
    compared = 0
    for adapters in (m for m in ours.modules() if isinstance(m, LoRAAdapters)):
        gradients = adapters.trial_tensors(0, {name: p.grad[0] for name, p in adapters.named_parameters()})
        for name, gradient in gradients.items():
            *_, block, _, place, leaf = name.split(".")
            theirs_name = f"base_model.model.vit.layers.{block[-1]}.{places[place]}.{leaf}"
            their = found.pop(theirs_name + ("_" if leaf == "lora_magnitude" else ".") + ends[leaf])
            torch.testing.assert_close(gradient, their, rtol=1e-4, atol=1e-5 * float(their.abs().max()))
            compared += 1
    assert (compared, found) == (2 * 6 * 3, {})


def test_peft_has_one_adapter_of_a_fused_layer(trial_of, tmp_path, call):
    assert call("export", trial_of("timm"), "--format", "peft", "--out", tmp_path / "out")[0] == 0
    parameters = {n: p for n, p in peft(tmp_path / "out").named_parameters() if ".lora_" in n}
    assert {name.partition(".lora_")[0][17:] for name in parameters} == {
        f"blocks.1.{part}" for part in ("attn.qkv", "attn.proj", "mlp.fc2")
    }
    assert {len(p) for n, p in parameters.items() if "qkv.lora_A" in n} == {6}  # q and v, rank 3 each
    assert not parameters["base_model.model.blocks.1.attn.qkv.lora_B.default.weight"][48:96].any()  # k


@pytest.mark.parametrize("kind", ["torchvision", "timm", "dinov2"])
def test_what_peft_got_comes_back(kind, trial_of, tmp_path, call):
    """With the trial's own tensors, although a fused layer has one adapter there."""
    folder, side = trial_of(kind), 16 if kind == "torchvision" else 32
    assert call("export", folder, "--format", "peft", "--out", tmp_path / "out")[0] == 0
    model = load_peft(plain_model(folder), tmp_path / "out").eval()
    torch.testing.assert_close(adapter_state_dict(model), load_file(folder / "adapter.safetensors"), rtol=1e-6, atol=0)
    torch.testing.assert_close(model(images(side)).detach(), trials_logits(folder, images(side)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("of", "method"), [("torchvision", "lora"), ("small_vit", "dora")])
def test_an_adapter_of_ones_own_loop_goes_to_peft(of, method, tmp_path, call):
    """With the base's weights from a file; by PEFT itself, and for HF's ViT where it is on torchvision's."""
    register_small()
    made = {"torchvision": lambda: VisionTransformer(**SIZES, num_classes=4)}.get(of, lambda: timm_model(of, 32, 4))
    model, x = randomised(made(), 0.2), images(16 if of == "torchvision" else 32)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    replace_linear_with_lora(model, rank=3, targets=["q", "v", "o", "fc2"], method=method).requires_grad_(False)
    randomised(nn.ModuleList(m for m in model.modules() if isinstance(m, LoRAAdapters)), 0.2)
    save_adapter(model, tmp_path / "own", class_names=["a", "b", "c", "d"])
    given = ("export", tmp_path / "own", "--format", "peft", "--out", tmp_path / "out")
    code, out, err = call(*given, "--weights", tmp_path / "base.pth")
    assert (code, err) == (0, "")
    assert "note: the export does not say how pictures are prepared" in out
    theirs = peft(tmp_path / "out").eval()
    found, expected = theirs(x), model(x)
    torch.testing.assert_close(getattr(found, "logits", found), expected, rtol=1e-5, atol=1e-5)
    torch.save(randomised(made(), 0.3).state_dict(), tmp_path / "other.pth")
    refused = [([], "give --weights FILE"), (["--weights", tmp_path / "other.pth"], "weights are not those that")]
    if of == "small_vit":
        for module in (m for m in model.modules() if hasattr(m, "num_heads")):
            module.num_heads, module.head_dim = 2, 24
        save_adapter(model, tmp_path / "own")
        refused.append((["--weights", tmp_path / "base.pth"], "computes something else with them"))
    for weights, words in refused:
        code, _, err = call(*given[:-1], tmp_path / "no", *weights)
        assert (code, err.count("\n"), words in err) == (1, 1, True), err


def trained_by_peft(of: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """PEFT's model with random adapters and head, and a plain one with its base's weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    if of == "hf":
        sizes = {"image_size": 16, "patch_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
        base: Any = ViTForImageClassification(
            ViTConfig(**sizes, hidden_size=32, intermediate_size=48, num_labels=4, layer_norm_eps=1e-6)
        )
        plain: Any = VisionTransformer(**SIZES, num_classes=2)
        plain.load_state_dict(translate(base.state_dict(), trunk_state(plain))[0], strict=False)
    else:
        import timm

        register_small()
        base, plain = timm.create_model(of, num_classes=4), timm.create_model(of, num_classes=2)
        plain.load_state_dict({n: t for n, t in base.state_dict().items() if "head" not in n}, strict=False)
    heads = ["classifier" if of == "hf" else "head"]
    model = get_peft_model(base, LoraConfig(**{"r": 4, "modules_to_save": heads, **settings})).eval()
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.3)
    return model, plain.eval()


FROM_PEFT = [
    ("hf", {"target_modules": ["q_proj", "v_proj", "fc1"], "lora_alpha": 12, "use_rslora": True}),
    ("hf", {"target_modules": ["o_proj", "fc2"], "rank_pattern": {"fc2": 2}, "alpha_pattern": {"1.mlp.fc2": 3}}),
    ("small_vit", {"target_modules": ["qkv", "attn.proj", "fc2"]}),
    ("small_eva02", {"target_modules": ["fc1_g", "fc1_x", "fc2"]}),
]


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # of an older PEFT
@pytest.mark.parametrize(("of", "settings"), FROM_PEFT)
def test_what_peft_trained_computes_the_same_here(of, settings, tmp_path):
    model, plain = trained_by_peft(of, settings)
    model.save_pretrained(tmp_path)
    x = images(16 if of == "hf" else 32)
    expected, found = model(x), load_peft(plain, tmp_path)(x)
    torch.testing.assert_close(found, getattr(expected, "logits", expected), rtol=1e-4, atol=1e-4)  # fp32
    narrow = VisionTransformer(**{**SIZES, "hidden_dim": 16})
    for other, words in ((plain, "has adapters already"), (narrow, "lacks in this size")):
        with pytest.raises(ConfigError, match=words):
            load_peft(other, tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True, "target_modules": ["fc2"]}, "lora_magnitude_vector"),
        ({"bias": "all", "target_modules": ["fc2"]}, "bias: adapters of linear layers and a head alone can be read"),
        ({"target_modules": ["patch_embed.proj"]}, "holds patch_embed.proj, which the VisionTransformer lacks"),
        ({"target_modules": ["head"], "modules_to_save": None}, "holds head, which the VisionTransformer lacks"),
        ({"modules_to_save": [], "target_modules": ["fc2"]}, "holds no adapter of a linear layer"),
        ({}, "is no adapter of PEFT's"),
    ],
)
def test_what_is_more_than_adapters_of_layers_that_are_there_is_refused(settings, words, tmp_path):
    model, plain = trained_by_peft("small_vit", settings or {"target_modules": ["fc2"]})
    if settings:
        model.save_pretrained(tmp_path)
    if "no adapter" in words and settings:
        save_file({"base_model.model.head.bias": torch.zeros(4)}, tmp_path / "adapter_model.safetensors")
    before = {n: t.clone() for n, t in plain.state_dict().items()}
    with pytest.raises(ConfigError, match=words):
        load_peft(plain, tmp_path)
    torch.testing.assert_close(dict(plain.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("setting", ["lora=none", "lora.bias=all"])
def test_what_is_no_adapter_goes_to_hf_only(setting, tmp_path, call):
    train_together([trial_config("trainer.precision=fp32", "optimizer.lr=3e-3", setting)], tmp_path)
    code, _, err = call("export", tmp_path / "0", "--format", "peft", "--out", tmp_path / "peft")
    assert (code, err.count("\n")) == (1, 1)
    assert all(word in err for word in (f"error: {setting} ", "PEFT", "--format timm or hf"))
    assert not (tmp_path / "peft").exists()
    assert call("export", tmp_path / "0", "--format", "hf", "--out", tmp_path / "hf")[0] == 0
    found = interop.opened("hf", tmp_path / "hf")(images(16))
    torch.testing.assert_close(found, trials_logits(tmp_path / "0", images(16)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("small_beit", "peft", "PEFT never calls blocks.0.attn.qkv of small_beit"),
        ("small_beit", "hf", "HF has no small_beit (Dinov2 differs in "),
        ("test_vit4", "hf", "HF has no test_vit4 (Dinov2WithRegisters differs in "),  # RMS norms
    ],
)
def test_what_another_library_has_not_is_refused(name, form, reason, trial_of, tmp_path, call):
    if name == "test_vit4":
        train_together([timm_config(*LARGE, "lora.rank=3", name=name)], tmp_path)
    folder = tmp_path / "0" if name == "test_vit4" else trial_of("beit")
    code, _, err = call("export", folder, "--format", form, "--out", tmp_path / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith(f"error: {reason}")
    assert "give --format timm" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("function", "said"), [("write", "strides are lost\nand so on"), ("opened", "")])
def test_a_model_that_the_other_library_cannot_write_or_read(said, function, trial, tmp_path, call, monkeypatch):
    def fail(*_: object) -> None:
        raise ValueError(said)

    monkeypatch.setattr(interop, function, fail)
    code, _, err = call("export", trial, "--format", "hf", "--out", tmp_path / "new" / "out")
    what = f"cannot be written for vit_tiny (ValueError: {said.partition(chr(10))[0]}): give another format"
    assert (code, err) == (1, f"error: --format hf {what}\n")
    assert not list((tmp_path / "new").iterdir())


def test_nothing_is_kept_of_an_export_that_differs(trial, tmp_path, call, monkeypatch):
    opened = interop.opened
    monkeypatch.setattr(interop, "opened", lambda *given: lambda x: opened(*given)(x) + 0.1)
    code, _, err = call("export", trial, "--format", "hf", "--out", tmp_path / "new" / "out")
    assert (code, err) == (1, f"error: {trial}: the export differs by 1.00e-01; nothing written\n")
    assert not list((tmp_path / "new").iterdir())


def test_refusals_before_any_work(trial, tmp_path, call, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, _, err = call("export", trial, "--format", "hf", "--out", tmp_path / "out")
    assert (code, err) == (1, f"error: --out {tmp_path}/out is there already: give a new folder\n")
    monkeypatch.setattr("lora_vit.export.find_spec", lambda package: None)
    code, _, err = call("export", trial, "--format", "onnx", "--out", tmp_path / "new")
    libraries = "onnx, onnxscript, onnxruntime"
    assert (code, err) == (1, f"error: --format onnx needs {libraries}: pip install 'lora_vit[onnx]'\n")


def test_an_export_is_made_on_the_cpu(trial, tmp_path, call, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert call("export", trial, "--format", "timm", "--out", tmp_path / "out")[0] == 0
    assert call("export", trial, "--format", "timm", "--out", tmp_path / "gpu", "--device", "gpu")[0] == 2


@pytest.mark.slow
def test_the_snippets_of_the_page_run(trial, project_root, tmp_path, call, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "image.png")
    for form in FORMATS:
        assert call("export", trial, "--format", form, "--out", f"exported/{form}")[0] == 0
    page = (project_root / "docs" / "interop.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert {form for form in FORMATS if f"exported/{form}" in "".join(snippets)} == set(FORMATS)
    for snippet in snippets:
        exec(compile(snippet, "docs/interop.md", "exec"), {})
    assert "trainable params: " in capsys.readouterr().out
