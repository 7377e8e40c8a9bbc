"""Exports: what other libraries make of the files is what the trial does, and the snippets in docs/interop.md run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import train_together, trial_config
from hydra import compose, initialize_config_module
from PIL import Image
from torch import Tensor
from torchvision.models import VisionTransformer

from lora_vit import interop, load_adapter, predict
from lora_vit.compose import from_omegaconf, register_schema
from lora_vit.export import FORMATS
from lora_vit.models.vit import build_trunk, timm_trunk

for package in ("transformers", "timm", "peft", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

pytestmark = [
    # onnxruntime and torch.export leave files to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
TRACED = [pytest.param(form, marks=pytest.mark.slow if form in ("onnx", "torch_export") else ()) for form in FORMATS]
SIZES = {"image_size": 16, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 48}
ROOT = Path(__file__).parents[2]


def train(folder: Path, *overrides: str) -> Path:
    """A trial whose adapters change the logits."""
    settings = ("trainer.precision=fp32", "optimizer.lr=3e-2", "lora.rank=3", "lora.alpha=5")
    train_together([trial_config(*(s for s in settings if "none" not in overrides), *overrides)], folder)
    return folder / "0"


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("trial"))


def timm_trial(folder: Path, name: str, *overrides: str) -> Path:
    """A trial on a model of timm with random weights."""
    register_schema()
    settings = ["model=timm", f"model.name={name}", "model.weights=null", "data=fake", "trainer.epochs=2"]
    settings += ["trainer.precision=fp32", "trainer.accelerator=cpu", "optimizer.lr=3e-2", "lora.rank=3"]
    with initialize_config_module("lora_vit.conf", version_base="1.3"):
        config = from_omegaconf(compose("config", overrides=[*settings, *overrides]))
    train_together([config], folder)
    return folder / "0"


def images(count: int = 3, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))


def plain(with_adapter: Path | None) -> torch.nn.Module:
    """torchvision's model with the base's weights, and the adapter put on it."""
    model = VisionTransformer(**SIZES, num_classes=4)
    model.load_state_dict(build_trunk(*SIZES.values()).state_dict(), strict=False)
    return (model if with_adapter is None else load_adapter(model, with_adapter)).eval()


@torch.no_grad()
def trials_logits(folder: Path) -> Tensor:
    return plain(folder)(images())


@torch.no_grad()
def read(form: str, folder: Path, x: Tensor) -> Tensor:
    """Logits of an export by its library alone."""
    if form == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        return torch.from_numpy(session.run(None, {"images": x.numpy()})[0])
    if form == "torch_export":
        return torch.export.load(folder / "model.pt2").module()(x)
    if form == "timm":
        import timm

        settings = json.loads((folder / "config.json").read_text())
        model = timm.create_model(
            settings["architecture"],
            **settings["model_args"],
            checkpoint_path=folder / "model.safetensors",
        )
        return model.eval()(x)
    from transformers import AutoModelForImageClassification

    if form == "hf":
        return AutoModelForImageClassification.from_pretrained(folder)(x).logits
    from peft import PeftModel

    model = AutoModelForImageClassification.from_pretrained(folder / "base")
    return PeftModel.from_pretrained(model, folder).eval()(x).logits


@pytest.mark.parametrize("form", TRACED)
def test_an_export_gives_the_trials_logits(form, trial, tmp_path, call):
    code, out, _ = call("export", trial, "--format", form, "--out", tmp_path / "out")
    assert code == 0
    assert re.search(r"^largest logit difference \d\.\d\de-0\d, 0 of 16 predictions changed on made images$", out, re.M)
    assert str(tmp_path / "out") in out
    expected = trials_logits(trial)
    # each product is rounded in another order
    torch.testing.assert_close(read(form, tmp_path / "out", images()), expected, rtol=1e-4, atol=1e-4)
    without = plain(None)
    without.heads.head = plain(trial).heads.head
    with torch.no_grad():
        assert (without(images()) - expected).abs().max() > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def picture(path: Path) -> Path:
    """Smooth, larger than the model's images, and not square."""
    rows, columns = np.mgrid[0:60, 0:90] / 60
    pixels = np.stack([rows, columns / 1.5, (rows + columns) / 2.5], -1) * 250
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.mark.parametrize("cropped", [True, False])
def test_class_names_and_preprocessing_travel(cropped, trial, tmp_path, call, monkeypatch, capsys):
    """Others' transforms, which round pixels to whole numbers once more, see what predict sees."""
    import timm
    from transformers import pipeline

    if not cropped:
        card = json.loads((trial / "adapter.json").read_text())
        card["decoded_size"] = None  # as of a data set whose images have one size
        read_adapter = interop.read_adapter
        monkeypatch.setattr(interop, "read_adapter", lambda folder: interop.Adapter(read_adapter(folder).tensors, card))
        monkeypatch.setattr("lora_vit.lora.adapter.read_adapter", interop.read_adapter)
    image = picture(tmp_path / "image.png")  # on which bilinear and bicubic hardly differ
    assert predict.predict_folder(trial, [image], None, tmp_path / "p.csv", None, "cpu") == 0
    rows = [line.split(",") for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    expected = {name: float(p) for _, _, name, p in rows}
    for form in ("hf", "timm"):
        assert call("export", trial, "--format", form, "--out", tmp_path / form)[0] == 0
    assert json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())["resample"] == 2  # bilinear
    found = {one["label"]: one["score"] for one in pipeline("image-classification", str(tmp_path / "hf"))(str(image))}
    assert found == pytest.approx(expected, abs=0.02)
    model = timm.create_model(f"local-dir:{tmp_path}/timm", pretrained=True).eval()
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        p = model(transform(Image.open(image).convert("RGB"))[None]).softmax(-1)[0]
    assert dict(zip(model.pretrained_cfg["label_names"], p.tolist(), strict=True)) == pytest.approx(expected, abs=0.02)


def test_peft_adapts_what_the_trial_adapted(tmp_path, call):
    folder = train(tmp_path, "lora.targets=[q,v,fc2]", "lora.blocks=[1]", "lora.scaling=rslora")
    assert call("export", folder, "--format", "peft", "--out", tmp_path / "peft")[0] == 0
    from peft import PeftModel
    from transformers import AutoModelForImageClassification

    base = AutoModelForImageClassification.from_pretrained(tmp_path / "peft" / "base")
    model = PeftModel.from_pretrained(base, tmp_path / "peft", is_trainable=True).eval()
    adapted = {name.partition(".lora_")[0][17:] for name, _ in model.named_parameters() if ".lora_" in name}
    assert adapted == {f"vit.layers.1.{part}" for part in ("attention.q_proj", "attention.v_proj", "mlp.fc2")}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 3 + 2  # A and B of each, and the head
    expected = trials_logits(folder)
    with torch.no_grad():
        torch.testing.assert_close(model(images()).logits, expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload()(images()).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["lora=none"], "lora=none trains more than adapters"),
        (["lora=full"], "lora=full trains more than adapters"),
        (["lora.bias=all"], "lora.bias=all trains more than adapters"),
    ],
)
def test_what_is_no_adapter_goes_to_hf_only(overrides, reason, tmp_path, call):
    settings = ("trainer.precision=fp32", "optimizer.lr=3e-3")
    train_together([trial_config(*settings, *overrides)], tmp_path)
    code, _, err = call("export", tmp_path / "0", "--format", "peft", "--out", tmp_path / "peft")
    assert (code, err) == (1, f"error: {reason}, which PEFT's files hold: give --format timm or hf\n")
    assert not (tmp_path / "peft").exists()
    assert call("export", tmp_path / "0", "--format", "hf", "--out", tmp_path / "hf")[0] == 0
    found = read("hf", tmp_path / "hf", images())
    torch.testing.assert_close(found, trials_logits(tmp_path / "0"), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def of_timm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("timm")
    return timm_trial(folder, "test_vit", "model.image_size=32", "lora.targets=[q,v,o,fc2]", "lora.blocks=[1,4]")


def of_timm_logits(folder: Path, name: str, x: Tensor) -> Tensor:
    """timm's own model with the base's weights, and the adapter put on it."""
    import timm

    side = x.shape[-1]
    model = timm.create_model(name, num_classes=4, img_size=side)
    model.load_state_dict(timm_trunk(name, side).state_dict(), strict=False)
    with torch.no_grad():
        return load_adapter(model, folder).eval()(x)


@pytest.mark.parametrize("form", TRACED)
def test_timms_models_as_well(form, of_timm, tmp_path, call):
    code, _, err = call("export", of_timm, "--format", form, "--out", tmp_path / "out")
    assert code == 0, err
    expected = of_timm_logits(of_timm, "test_vit", images(size=32))
    if form == "peft":
        import timm
        from peft import PeftModel

        base = timm.create_model(f"local-dir:{tmp_path}/out/base", pretrained=True)
        model = PeftModel.from_pretrained(base, tmp_path / "out", is_trainable=True).eval()
        adapted = {n: p.shape for n, p in model.named_parameters() if ".lora_" in n}
        parts = {name.partition(".lora_")[0][17:] for name in adapted}
        assert parts == {f"blocks.{i}.{part}" for i in (1, 4) for part in ("attn.qkv", "attn.proj", "mlp.fc2")}
        assert {shape[0] for n, shape in adapted.items() if "qkv.lora_A" in n} == {6}  # q and v, rank 3 each
        with torch.no_grad():
            found = model(images(size=32))
            keys = dict(model.named_parameters())["base_model.model.blocks.1.attn.qkv.lora_B.default.weight"]
            assert not keys[64:128].any()
    else:
        found = read(form, tmp_path / "out", images(size=32))
    if form == "hf":
        assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["resample"] == 3  # bicubic
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "side"), [("beit_base_patch16_224", 32), ("eva02_tiny_patch14_224", 28)])
def test_attention_with_a_bias_or_rotations_becomes_a_graph(name, side, tmp_path, call):
    folder = timm_trial(tmp_path, name, f"model.image_size={side}", "lora.rank=2", "trainer.epochs=1")
    code, _, err = call("export", folder, "--format", "onnx", "--out", tmp_path / "onnx")
    assert code == 0, err
    found = read("onnx", tmp_path / "onnx", images(size=side))
    torch.testing.assert_close(found, of_timm_logits(folder, name, images(size=side)), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_dinov2_with_registers_becomes_hfs(tmp_path, call):
    name = "vit_small_patch14_reg4_dinov2"
    folder = timm_trial(tmp_path, name, "model.image_size=42", "lora.rank=8", "trainer.epochs=1")
    for form in ("hf", "timm"):
        code, _, err = call("export", folder, "--format", form, "--out", tmp_path / form)
        assert code == 0, err
        found = read(form, tmp_path / form, images(size=42))
        torch.testing.assert_close(found, of_timm_logits(folder, name, images(size=42)), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["model_type"] == "dinov2_with_registers"


@pytest.mark.parametrize(
    ("name", "form", "reason"),
    [
        ("vit_tiny_patch16_dinov3_qkvb", "peft", "PEFT never calls blocks.0.attn.qkv of vit_tiny_patch16_dinov3_qkvb"),
        ("test_vit2", "hf", "HF has no test_vit2 (Dinov2WithRegisters differs in "),
        ("test_vit4", "hf", "HF has no test_vit4 (Dinov2WithRegisters differs in "),  # RMS norms
        ("vit_tiny_patch16_dinov3_qkvb", "hf", "HF has no vit_tiny_patch16_dinov3_qkvb (Dinov2With"),
    ],
)
def test_what_another_library_has_not_is_refused(name, form, reason, tmp_path, call):
    folder = timm_trial(tmp_path, name, "model.image_size=32", "trainer.epochs=1")
    code, _, err = call("export", folder, "--format", form, "--out", tmp_path / "out")
    assert code == 1
    assert err.startswith(f"error: {reason}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_nothing_is_kept_of_an_export_that_differs(trial, tmp_path, call, monkeypatch):
    write, load = interop.FORMATS["hf"]
    monkeypatch.setitem(interop.FORMATS, "hf", (write, lambda out, x: load(out, x) + 0.1))
    code, _, err = call("export", trial, "--format", "hf", "--out", tmp_path / "new" / "out")
    assert (code, err) == (1, f"error: {trial}: the export differs by 1.00e-01; nothing written\n")
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize("reading", [False, True])
@pytest.mark.parametrize("said", ["strides are lost\nand so on", ""])
def test_a_model_that_the_other_library_cannot_write_is_told_in_one_line(
    said, reading, trial, tmp_path, call, monkeypatch
):
    def fail(one: object, other: object) -> Tensor:
        raise ValueError(said)

    write, load = interop.FORMATS["hf"]
    monkeypatch.setitem(interop.FORMATS, "hf", (write, fail) if reading else (fail, load))
    code, _, err = call("export", trial, "--format", "hf", "--out", tmp_path / "out")
    what = f"cannot be written for vit_tiny (ValueError: {said.partition(chr(10))[0]}): give another format"
    assert (code, err) == (1, f"error: --format hf {what}\n")
    assert not list(tmp_path.iterdir())


def test_refusals_before_any_work(trial, tmp_path, call, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    code, _, err = call("export", trial, "--format", "hf", "--out", tmp_path / "out")
    assert (code, err) == (1, f"error: --out {tmp_path}/out is there already: give a new folder\n")
    monkeypatch.setattr("lora_vit.export.find_spec", lambda package: None)
    code, _, err = call("export", trial, "--format", "onnx", "--out", tmp_path / "new")
    libraries = "onnx, onnxscript, onnxruntime"
    assert (code, err) == (1, f"error: --format onnx needs {libraries}: pip install 'lora_vit[onnx]'\n")


@pytest.mark.slow
def test_the_snippets_of_the_page_run(trial, tmp_path, call, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    picture(tmp_path / "image.png")
    for form in FORMATS:
        assert call("export", trial, "--format", form, "--out", f"exported/{form}")[0] == 0
    page = (ROOT / "docs" / "interop.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    assert {form for form in FORMATS if f"exported/{form}" in "".join(snippets)} == set(FORMATS)
    for snippet in snippets:
        exec(compile(snippet, "docs/interop.md", "exec"), {})
    assert "trainable params: " in capsys.readouterr().out
