"""Models of open_clip as bases; those that need the package build small random checkpoints from its own configs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_server import HubServer
from PIL import Image
from safetensors.torch import save_file
from support import run
from transformers import AutoTokenizer, BertConfig, pipeline

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments
from taskres_hf.encoders import BaseSource, load_image_processor
from taskres_hf.errors import BaseMismatchError, BaseModelError, MissingExtraError

PROMPTS = ["a cat", "a photo of a large red dog on a table", "fish"]
VISION = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2}
OWN_TEXT = {"vocab_size": 8192, "context_length": 64, "hf_tokenizer_name": "its/own", "pool_type": "last"}
CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {"vision_cfg": VISION, "text_cfg": TEXT, "quick_gelu": True},
    "coca": {
        "vision_cfg": {**VISION, "attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
        "text_cfg": {**TEXT, "context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "context_length": 76, "attn_pooler_heads": 4},
        "custom_text": True,
    },
    "siglip": {
        "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit4", "timm_pool": "avg", "timm_proj": "linear"},
        "text_cfg": {
            **TEXT, **OWN_TEXT, "no_causal_mask": True, "proj_bias": True, "tokenizer_kwargs": {"clean": "canonicalize"}
        },
        "init_logit_bias": -10,
        "custom_text": True,
    },
    "custom text": {
        "vision_cfg": VISION, "text_cfg": {**OWN_TEXT, "hf_model_name": "", "hf_pooler_type": "mean_pooler"}
    },
    "mobileclip": {
        "vision_cfg": {"timm_model_name": "fastvit_mci0", "timm_pool": "avg", "timm_proj": None, "image_size": 64},
        "text_cfg": {**TEXT, "no_causal_mask": True},
        "custom_text": True,
    },
    "eva": {
        "vision_cfg": {
            "timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224
        },
        "text_cfg": TEXT,
        "custom_text": True,
    },
}  # fmt: skip
PREPROCESSING = {
    "siglip": {"mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash"},
    "mobileclip": {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
}


@pytest.fixture(scope="module")
def open_clip() -> Any:
    return pytest.importorskip(
        "open_clip", reason="needs open_clip and a torchvision: pip install 'taskres_hf[open_clip]'", exc_type=Exception
    )


def written(folder: Path, model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    return folder


@pytest.fixture(scope="module")
def checkpoint(open_clip: Any, base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A random checkpoint as `open_clip.push_to_hf_hub.save_for_hf` lays it out."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp("open_clip") / kind.replace(" ", "-")
            config: dict[str, Any] = {"embed_dim": 24, **json.loads(json.dumps(CONFIGS[kind]))}
            if kind == "custom text":
                sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1, "num_attention_heads": 4}
                BertConfig(vocab_size=8192, pad_token_id=1, **sizes).save_pretrained(folder / "bert")
                config["text_cfg"]["hf_model_name"] = str(folder / "bert")
            written(folder, config, PREPROCESSING.get(kind, {}))
            if "hf_tokenizer_name" in config["text_cfg"]:
                AutoTokenizer.from_pretrained(base).save_pretrained(folder)
            torch.manual_seed(0)
            random = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
            with torch.no_grad():
                random.logit_scale.fill_(3.0)
            save_file(random.state_dict(), folder / "open_clip_model.safetensors")
            made[kind] = folder
        return made[kind]

    return make


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_from_a_checkpoint_to_pipeline(
    kind: str, open_clip: Any, checkpoint: Callable[[str], Path], splits: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoint(kind)
    own, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}", pretrained_text=False)
    pictures = [row["image"].convert("RGB") for row in splits["train"].select(range(3))]
    model = Model.from_base(f"local-dir:{folder}", PROMPTS, templates="{}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    pixels = torch.stack([prepare(one) for one in pictures])
    with torch.no_grad():
        image, text = own.eval().encode_image(pixels, normalize=True), own.encode_text(tokens, normalize=True)
        expected = own.logit_scale.exp() * image @ text.T + (0.0 if own.logit_bias is None else own.logit_bias)
        found = model(pixel_values=pixels).logits
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    assert model.config.base_model_type == "open_clip"
    assert model.config.base_model_name_or_path == str(folder)

    model = Model.from_base(str(folder), spec["classes"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(shots=2, disable_tqdm=True), splits["train"])
    trainer.train()
    model.save_pretrained(tmp_path / "trained")
    again = Model.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        torch.testing.assert_close(again(pixels).logits, model(pixels).logits, atol=1e-4, rtol=1e-4)
    (answer,) = pipeline("image-classification", model=str(tmp_path / "trained"))(pictures[:1], top_k=1)
    inputs = again.image_processor(images=pictures[:1], return_tensors="pt")
    assert answer[0]["label"] == model.class_names[int(again(**inputs).logits[0].argmax())]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["clip", "siglip", "mobileclip"])
def test_pictures_are_prepared_as_open_clip_does(kind: str, open_clip: Any, checkpoint: Callable[[str], Path]) -> None:
    folder = checkpoint(kind)
    _, prepare = open_clip.create_model_from_pretrained(f"local-dir:{folder}", pretrained_text=False)
    # Where the margin of the crop is odd, the two leave the odd pixel on other sides.
    noise = np.random.default_rng(0).integers(0, 255, (90, 135, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((540, 360))
    found = load_image_processor(BaseSource(str(folder)))(images=[picture], return_tensors="pt")["pixel_values"]
    assert found.shape[1:] == prepare(picture).shape
    assert float((found[0] - prepare(picture)).abs().max()) < 0.02  # one step of 255 in some pixels


@pytest.mark.filterwarnings("ignore")
def test_two_checkpoints_are_told_apart(
    open_clip: Any, checkpoint: Callable[[str], Path], spec: dict[str, Any], tmp_path: Path
) -> None:
    Model.from_base(str(checkpoint("clip")), spec["classes"]).save_pretrained(tmp_path / "saved")
    Model.from_pretrained(tmp_path / "saved", base_model=str(checkpoint("clip")))
    for part in ("visual", "transformer"):  # of one tower alone
        other = tmp_path / part
        shutil.copytree(checkpoint("clip"), other)
        whole = open_clip.create_model(f"local-dir:{other}")
        with torch.no_grad():
            for name, weight in whole.named_parameters():
                if name.startswith(part):
                    weight.mul_(1.1)
        save_file(whole.state_dict(), other / "open_clip_model.safetensors")
        with pytest.raises(BaseMismatchError, match="image tower" if part == "visual" else "text embeddings"):
            Model.from_pretrained(tmp_path / "saved", base_model=str(other))


@pytest.mark.filterwarnings("ignore")
def test_a_dtype_an_option_and_weights_that_are_not_whole(
    open_clip: Any, checkpoint: Callable[[str], Path], spec: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoint("clip")
    exact = Model.from_base(str(folder), spec["classes"])
    half = Model.from_base(str(folder), spec["classes"], dtype=torch.bfloat16, device_map="cpu")
    assert half.clip.dtype == torch.bfloat16
    torch.testing.assert_close(half.classifier.base, exact.classifier.base)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(half(pixels).logits.float(), exact(pixels).logits, atol=0.5, rtol=0.1)
    with pytest.raises(BaseModelError, match="attn_implementation is not to be had"):
        Model.from_base(str(folder), spec["classes"], attn_implementation="eager")
    shutil.copytree(folder, tmp_path / "half")
    tensors = dict(open_clip.create_model(f"local-dir:{folder}").state_dict())
    tensors.pop("ln_final.weight")
    save_file(tensors, tmp_path / "half" / "open_clip_model.safetensors")
    with pytest.raises(BaseModelError, match=r"cannot be loaded by open_clip.*ln_final"):
        Model.from_base(str(tmp_path / "half"), spec["classes"])


@pytest.mark.filterwarnings("ignore")
def test_a_repository(
    open_clip: Any, checkpoint: Callable[[str], Path], spec: dict[str, Any], hub: HubServer, tmp_path: Path
) -> None:
    """Its files come at one commit, which is recorded; the classifier is loaded on that one."""
    hub.add_folder("tester/siglip", checkpoint("siglip"))
    model = Model.from_base("hf-hub:tester/siglip", spec["classes"], cache_dir=str(tmp_path / "cache"))
    assert model.config.base_model_name_or_path == "tester/siglip"
    assert len(model.config.base_model_revision) == 40
    local = Model.from_base(str(checkpoint("siglip")), spec["classes"])
    torch.testing.assert_close(model.classifier.base, local.classifier.base)
    assert model.image_processor.size == local.image_processor.size
    model.save_pretrained(tmp_path / "saved")
    Model.from_pretrained(tmp_path / "saved", cache_dir=str(tmp_path / "cache"))


@pytest.mark.filterwarnings("ignore")
def test_prompts_that_are_too_long_are_said(open_clip: Any, checkpoint: Callable[[str], Path]) -> None:
    with pytest.warns(UserWarning, match="longer than the text tower's 77 tokens"):
        Model.from_base(str(checkpoint("clip")), ["a cat", "dog " * 100], templates="{}")


@pytest.mark.filterwarnings("ignore")
def test_the_command_line(
    open_clip: Any, checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("red", "blue"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(3):
            color = (255, number, 0) if name == "red" else (0, number, 255)
            Image.new("RGB", (40, 32), color).save(tmp_path / "photos" / name / f"{number}.png")
    arguments = ["--base-model", f"local-dir:{checkpoint('clip')}", "--output-dir", tmp_path / "out", "--json"]
    code, out, err = run(capsys, "train", tmp_path / "photos", *arguments)
    assert code == 0, err
    code, out, err = run(capsys, "predict", tmp_path / "out", tmp_path / "photos" / "red" / "0.png", "--json")
    assert code == 0, err
    assert '"red"' in out


# ---------------------------------------------------------------------- without the package


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    folder = written(tmp_path / "plain", {"embed_dim": 24, **CONFIGS["clip"]}, {})
    save_file({"logit_scale": torch.zeros(())}, folder / "open_clip_model.safetensors")
    return folder


def test_without_the_package_it_is_said_what_to_install(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(MissingExtraError, match=r"pip install \"taskres_hf\[open_clip\]\""):
        Model.from_base(str(plain), PROMPTS)


def test_pickles_are_refused(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", transformers)  # never asked
    (plain / "open_clip_model.safetensors").rename(plain / "open_clip_pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"can run code.*save_file"):
        Model.from_base(str(plain), PROMPTS)


@pytest.mark.parametrize(
    "options", [{"trust_remote_code": True}, {"bpe_path": "/etc/passwd"}, ["clean"]], ids=["code", "path", "list"]
)
def test_a_config_does_not_choose_what_a_tokenizer_runs(
    options: Any, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from taskres_hf.encoders import load_tokenizer

    monkeypatch.setitem(sys.modules, "open_clip", transformers)  # never asked
    written(plain, {"embed_dim": 24, **CONFIGS["clip"], "text_cfg": {**TEXT, "tokenizer_kwargs": options}}, {})
    with pytest.raises(BaseModelError, match="tokenizer_kwargs"):
        load_tokenizer(BaseSource(str(plain)))


def test_a_damaged_config_and_a_tag_are_refused(plain: Path) -> None:
    (plain / "open_clip_config.json").write_text('{"model_cfg": {}}')
    with pytest.raises(BaseModelError, match=r"open_clip_config.json .* is damaged"):
        Model.from_base(str(plain), PROMPTS)
    with pytest.raises(BaseModelError, match="get_pretrained_cfg"):
        Model.from_base("open_clip:ViT-B-32/laion2b_s34b_b79k", PROMPTS)


def test_a_way_of_resizing_that_is_not_to_be_had(plain: Path) -> None:
    written(plain, {"embed_dim": 24, **CONFIGS["clip"]}, {"resize_mode": "longest"})
    with pytest.raises(BaseModelError, match="resize_mode 'longest'"):
        load_image_processor(BaseSource(str(plain)))


def test_files_of_transformers_come_first(base: str, tmp_path: Path, spec: dict[str, Any]) -> None:
    """As LAION's repositories have them, beside open_clip's own."""
    folder = tmp_path / "both"
    shutil.copytree(base, folder)
    written(folder, {"embed_dim": 24, **CONFIGS["clip"]}, {})
    assert Model.from_base(f"local-dir:{folder}", spec["classes"]).config.base_model_type == "clip"
