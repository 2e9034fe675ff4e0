"""Every family of dual encoders, from a checkpoint on disk to `pipeline`, as a user goes with it."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import ENDS_AT_EOS, TINY_FAMILIES, pil_processor, tiny_config
from transformers import AutoModel, AutoTokenizer, CLIPConfig, CLIPModel, FlavaForPreTraining, pipeline
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import TaskResTrainer, TaskResTrainingArguments, encoders
from taskres_hf.encoders import FAMILIES, EncoderFamily, encode_texts, family_of, register_family, tokenize
from taskres_hf.errors import BaseModelError, ConfigurationError

PROMPTS = ["a cat", "a photo of a large red dog on a table", "fish"]
PROCESSORS = {
    "siglip2": ("Siglip2", {"patch_size": 8, "max_num_patches": 16}), "owlvit": ("OwlViT", {}), "owlv2": ("Owlv2", {}),
    "flava": ("Flava", {}), "siglip": ("Siglip", {}), "blip": ("Blip", {}), "clipseg": ("ViT", {}),
    "chinese_clip": ("ChineseCLIP", {}), "align": ("EfficientNet", {}), "vision-text-dual-encoder": ("ViT", {}),
}  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "encoders.md"


@pytest.fixture(scope="module")
def checkpoint(base: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """A random checkpoint of a family with the shipped tokenizer and the image processor of its kind."""
    made: dict[str, str] = {}

    def make(family: str) -> str:
        if family == "siglip" and TOKENIZER_MAPPING_NAMES.get("siglip", "") is None:
            pytest.skip("this transformers reads no other tokenizer for SigLIP than its own, which needs sentencepiece")
        if family not in made:
            config = tiny_config(family)
            config.text_config.vocab_size = 8192
            if family in ENDS_AT_EOS:
                config.text_config.eos_token_id = 8191  # these read their answer where the text ends
            torch.manual_seed(0)
            model = AutoModel.from_config(config).eval()
            with torch.no_grad():  # untrained scales and biases are too plain to tell formulas apart
                for name, value in (("logit_bias", -3.0), ("logit_scale", 4.7), ("temperature", 0.6)):
                    if hasattr(model, name):
                        getattr(model, name).fill_(value)
            folder = str(tmp_path_factory.mktemp(family))
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(base).save_pretrained(folder)
            kind, options = PROCESSORS.get(family, ("CLIP", {}))
            if family != "siglip2":
                options = {"size": {"height": 32, "width": 32}, "crop_size": {"height": 32, "width": 32}}
            pil_processor(kind, **options).save_pretrained(folder)
            made[family] = folder
        return made[family]

    return make


def _own_logits(family: str, folder: str, images: dict[str, Any], tokens: dict[str, Any]) -> torch.Tensor:
    """What the model itself makes of pictures and tokens."""
    if family != "flava":
        logits: torch.Tensor = AutoModel.from_pretrained(folder).eval()(**images, **tokens).logits_per_image
        return logits
    whole = FlavaForPreTraining(AutoModel.from_pretrained(folder).config).eval()  # the scores are its head's
    whole.flava = AutoModel.from_pretrained(folder).eval()
    scores = whole(**images, **tokens, return_loss=False).contrastive_logits_per_image
    assert scores is not None
    return scores


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_from_a_checkpoint_to_pipeline(
    family: str, checkpoint: Callable[[str], str], splits: Any, spec: dict[str, Any], tmp_path: Path
) -> None:
    folder, few = checkpoint(family), splits["train"]
    model = Model.from_base(folder, PROMPTS, templates="{}")
    pictures = [row["image"].convert("RGB") for row in few.select(range(3))]
    inputs = model.image_processor(images=pictures, return_tensors="pt")
    images = {name: inputs[name] for name in family_of(model.clip).image_inputs}
    with torch.no_grad():
        expected = _own_logits(family, folder, images, tokenize(model.clip, model.tokenizer, PROMPTS))
        found = model(**images).logits
    torch.testing.assert_close(found, expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-5)
    model = Model.from_base(folder, spec["classes"])
    trainer = TaskResTrainer(model, TaskResTrainingArguments(shots=2, disable_tqdm=True), few)
    trainer.train()
    assert not model.classifier.is_zero_shot
    model.save_pretrained(tmp_path / "trained")
    again = Model.from_pretrained(tmp_path / "trained")
    with torch.no_grad():
        torch.testing.assert_close(again(**images).logits, model(**images).logits, atol=1e-4, rtol=1e-4)
    (answer,) = pipeline("image-classification", model=str(tmp_path / "trained"))(pictures[:1], top_k=1)
    assert answer[0]["label"] == model.class_names[int(model(**images).logits[0].argmax())]


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_a_text_does_not_depend_on_what_stands_beside_it(family: str, checkpoint: Callable[[str], str]) -> None:
    """AIMv2's text tower, given no padding, attends to what comes after."""
    tower = AutoModel.from_pretrained(checkpoint(family)).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(family))
    together = encode_texts(tower, tokenizer, PROMPTS)
    alone = torch.cat([encode_texts(tower, tokenizer, [prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_scale_is_clamped_where_the_model_clamps_it(checkpoint: Callable[[str], str]) -> None:
    assert encoders.score_parameters(AutoModel.from_pretrained(checkpoint("aimv2")))[0] == pytest.approx(100.0)
    clip = AutoModel.from_pretrained(checkpoint("clip"))
    assert encoders.score_parameters(clip)[0] == pytest.approx(math.exp(4.7))


def test_the_table_of_the_docs() -> None:
    rows = []
    for name, row in sorted(FAMILIES.items()):
        marks = ["its own" if row.text_length else row.padding, row.score, "yes" if row.clip_layers else "no"]
        marks.append({"jina_clip": "of its own", "open_clip": "of open_clip"}.get(name, "of transformers"))
        rows.append(f"| `{name}` | {' | '.join(marks)} |")
    _, *found = re.findall(r"^\| `.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)  # under the heading
    assert found == rows


# ---------------------------------------------------------------------- a family of one's own


class _OwnConfig(CLIPConfig):  # type: ignore[misc]
    model_type = "my_clip"


class _OwnModel(CLIPModel):  # type: ignore[misc]
    config_class = _OwnConfig


def test_a_family_of_ones_own(base: str, tmp_path: Path, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "FAMILIES", FAMILIES)
    transformers.AutoConfig.register("my_clip", _OwnConfig, exist_ok=True)
    AutoModel.register(_OwnConfig, _OwnModel, exist_ok=True)
    torch.manual_seed(0)
    clip = CLIPModel.from_pretrained(base)
    own = _OwnModel(_OwnConfig(**{k: v for k, v in clip.config.to_dict().items() if k != "model_type"}))
    own.load_state_dict(clip.state_dict())
    own.save_pretrained(tmp_path / "own")
    for part in (AutoTokenizer, transformers.AutoImageProcessor):
        part.from_pretrained(base).save_pretrained(tmp_path / "own")
    with pytest.raises(BaseModelError, match="register_family"):
        Model.from_base(str(tmp_path / "own"), spec["classes"])
    try:
        register_family("my_clip", EncoderFamily())
        register_family("my_clip", EncoderFamily())  # once more, as a module that is imported again
        model = Model.from_base(str(tmp_path / "own"), spec["classes"])
        plain = Model.from_base(base, spec["classes"])
        assert torch.allclose(model.classifier.base, plain.classifier.base, atol=1e-5)
        with pytest.raises(ConfigurationError, match="known already"):
            register_family("my_clip", EncoderFamily(score="temperature"))
    finally:
        FAMILIES.pop("my_clip", None)


@pytest.mark.parametrize(
    ("name", "family"),
    [("", EncoderFamily()), ("x", None), ("x", EncoderFamily(score="cosine")), ("x", EncoderFamily(padding="left"))],
)
def test_a_family_that_nothing_can_read_is_refused(name: str, family: Any) -> None:
    with pytest.raises(ConfigurationError):
        register_family(name, family)
    assert "x" not in FAMILIES


def test_a_model_without_a_single_embedding_is_refused_with_the_reason(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "blip2").mkdir()
    (tmp_path / "blip2" / "config.json").write_text('{"model_type": "blip-2", "text_config": {}, "vision_config": {}}')
    with pytest.raises(BaseModelError, match="best of 32 embeddings"):
        Model.from_base(str(tmp_path / "blip2"), PROMPTS)


_JINA = """
from transformers import CLIPConfig, CLIPModel

class JinaCLIPConfig(CLIPConfig):
    model_type = "jina_clip"

class JinaCLIPModel(CLIPModel):
    config_class = JinaCLIPConfig
"""


@pytest.mark.filterwarnings("ignore")
def test_a_family_with_code_of_its_own(base: str, tmp_path: Path, spec: dict[str, Any]) -> None:
    """The code is a stand-in: what is tested is that it runs where, and only where, the user allows it."""
    folder = tmp_path / "jina"
    shutil.copytree(base, folder)
    (folder / "jina_code.py").write_text(_JINA)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "jina_code.JinaCLIPConfig", "AutoModel": "jina_code.JinaCLIPModel"}
    config |= {"model_type": "jina_clip", "auto_map": names, "architectures": ["JinaCLIPModel"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError, match="trust_remote_code"):
        Model.from_base(str(folder), spec["classes"])
    model = Model.from_base(str(folder), spec["classes"], trust_remote_code=True)
    assert torch.allclose(model.classifier.base, Model.from_base(base, spec["classes"]).classifier.base, atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    with pytest.raises(BaseModelError, match="base_trust_remote_code"):
        Model.from_pretrained(tmp_path / "saved")
    Model.from_pretrained(tmp_path / "saved", base_trust_remote_code=True)
