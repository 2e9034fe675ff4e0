"""Loading a base: its tokenizer, its dtype, its text tower left out."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual
from test_encoders import NAMES, copied
from transformers import AutoTokenizer, CLIPModel

from taskres_hf import TaskResCLIPForImageClassification as Model
from taskres_hf import base_model
from taskres_hf.errors import BaseModelError, ConfigurationError, MissingExtraError


@pytest.mark.parametrize(
    ("without", "files"),
    [
        (("tokenizer.json", "tokenizer_config.json"), {}),
        (("tokenizer.json",), {}),
        (("tokenizer.json",), {"tokenizer__json": b"{"}),
        (("tokenizer.json",), {"vocab__json": json.dumps({"a": 0, "<|endoftext|>": 1}).encode()}),
    ],
)
def test_a_base_without_its_tokenizer(
    base: str, tmp_path: Path, without: tuple[str, ...], files: dict[str, bytes]
) -> None:
    folder = copied(base, tmp_path / "base", without, **files)
    with pytest.raises(BaseModelError, match=r"tokenizer.*save_pretrained"):
        Model.from_base(str(folder), NAMES)
    assert Model.from_base(str(folder), NAMES, tokenizer=AutoTokenizer.from_pretrained(base)).class_names == NAMES


def test_a_tokenizer_that_does_not_fit(base: str, tmp_path: Path) -> None:
    empty = AutoTokenizer.from_pretrained(str(copied(base, tmp_path / "a", ("tokenizer.json",))))
    with pytest.raises(BaseModelError, match="same tokens of different words"):
        Model.from_base(base, NAMES, tokenizer=empty)
    larger = AutoTokenizer.from_pretrained(base)
    larger.add_tokens(["zebrafish"])
    with pytest.raises(BaseModelError, match="belongs to another model"):
        Model.from_base(base, ["zebrafish", "cat"], tokenizer=larger)
    without_end = AutoTokenizer.from_pretrained(base)
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32)
    clip.text_model.eos_token_id = 7  # the tower pools where this token stands, which is nowhere
    with pytest.raises(BaseModelError, match="same embedding for every prompt"):
        Model.from_base(clip, NAMES, tokenizer=without_end)


def test_dtypes_that_no_base_runs_in(base: str) -> None:
    for dtype in (torch.float64, "int8", "nonsense"):
        with pytest.raises(ConfigurationError, match="`dtype` must be"):
            Model.from_base(base, NAMES, dtype=dtype)
    with pytest.raises(BaseModelError, match="float64"):
        Model.from_base(CLIPModel.from_pretrained(base, dtype=torch.float64), NAMES)


def test_a_dtype_that_the_processor_multiplies_slowly_is_said_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_model, "speed_of", lambda dtype: {torch.bfloat16: 0.168, torch.float16: 0.95}[dtype])
    with pytest.warns(UserWarning, match=r"bfloat16.*0.2 times the speed of fp32.*dtype=torch.float32") as caught:
        Model.from_base(base, NAMES, dtype=torch.bfloat16)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Model.from_base(base, NAMES, dtype=torch.float16)
        Model.from_base(base, NAMES)


@pytest.fixture
def light(base: str, tmp_path: Path) -> Model:
    """A classifier whose text tower is not there."""
    random_residual(Model.from_base(base, NAMES)).save_pretrained(tmp_path / "light")
    return Model.from_pretrained(tmp_path / "light")


def test_tools_walk_over_the_missing_text_tower(light: Model, pixel_values: torch.Tensor) -> None:
    assert not hasattr(light.clip.text_model, "weight")
    assert getattr(light.clip.text_projection, "in_features", None) is None
    for call in (
        lambda: light.clip.text_model.encoder,
        lambda: light.clip.get_text_features(input_ids=torch.tensor([[1]])),
        lambda: light.clip(input_ids=torch.tensor([[1]]), pixel_values=pixel_values),
    ):
        with pytest.raises(BaseModelError, match="text_tower=True"):
            call()
    expected = light(pixel_values=pixel_values).logits
    clone = copy.deepcopy(light).to(torch.float32).apply(lambda module: None)
    assert clone.classifier.facts is clone.config.facts
    assert torch.equal(clone(pixel_values=pixel_values).logits, expected)
    assert not [name for name in light.state_dict() if "text" in name]
    traced = torch.jit.trace(light, pixel_values, strict=False)
    torch.testing.assert_close(traced(pixel_values)["logits"], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        smaller = torch.ao.quantization.quantize_dynamic(copy.deepcopy(light), {torch.nn.Linear})
    assert smaller(pixel_values=pixel_values).logits.shape == expected.shape


def test_the_model_is_exported_as_transformers_own(base: str, light: Model, pixel_values: torch.Tensor) -> None:
    own = CLIPModel.from_pretrained(base).vision_model
    try:
        torch.export.export(own, (pixel_values,))
    except Exception as error:  # of transformers 5.2 with torch 2.6
        pytest.skip(f"torch cannot export transformers' own image tower here: {type(error).__name__}")
    exported = torch.export.export(light, (pixel_values,))
    torch.testing.assert_close(exported.module()(pixel_values).logits, light(pixel_values=pixel_values).logits)


def test_what_is_no_base_is_named(base: str, light: Model) -> None:
    class Wrapped:
        merge_and_unload = None

    for wrong, why in ((None, "NoneType"), (3, "int"), (torch.nn.Linear(2, 2), "Linear"), (Wrapped(), "merge_and")):
        with pytest.raises(BaseModelError, match=f"Hub id, a folder or a transformers model.*{why}"):
            Model.from_base(wrong, NAMES)  # type: ignore[arg-type]
    folder = str(light.config._name_or_path)
    with pytest.raises(BaseModelError, match="got a int"):
        Model.from_pretrained(folder, base_model=3)  # type: ignore[arg-type]
    with pytest.raises(BaseModelError, match=r"TaskRes classifier.*\.clip"):
        Model.from_pretrained(folder, base_model=light)


@pytest.mark.parametrize(
    ("options", "error", "why"),
    [
        ({"attn_implementation": "nope"}, BaseModelError, "nope"),
        ({"attn_implementation": "flash_attention_2"}, MissingExtraError, "FlashAttention2"),
        ({"quantization_config": {"load_in_8bit": True}}, MissingExtraError, "pip install"),
        ({"device_map": "nowhere"}, BaseModelError, "nowhere"),
    ],
)
def test_what_this_machine_lacks_is_said(light: Model, options: dict[str, Any], error: type, why: str) -> None:
    with pytest.raises(error, match=why):
        Model.from_pretrained(light.config._name_or_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without one")
def test_an_accelerator_that_is_not_there(light: Model) -> None:
    with pytest.raises(BaseModelError, match=r"cannot be loaded.*(CUDA|NVIDIA)"):
        Model.from_pretrained(light.config._name_or_path, device_map="cuda")


def test_prompts_that_are_the_same_to_the_tokenizer(base: str) -> None:
    with (
        pytest.warns(UserWarning, match="'Cat' and 'cat'"),
        pytest.raises(ConfigurationError, match=r"All prompts become the same tokens, .*Cat"),
    ):
        Model.from_base(base, ["Cat", "cat"])
    with pytest.raises(ConfigurationError, match="once cut to the 32 that the text tower reads"):
        Model.from_base(base, ["cat", "dog"], templates="many words " * 40 + "{}")
    with pytest.warns(UserWarning, match="1 pair of classes' prompts"):  # as ImageNet's two missiles
        Model.from_base(base, ["cat", "dog", "bird"], prompt_names={"cat": "dog"})


def test_a_subfolder_that_is_not_there(base: str, light: Model) -> None:
    with pytest.raises(BaseModelError, match=r"no folder .*sub"):
        Model.from_base(base, NAMES, subfolder="sub")
    assert Model.from_pretrained(light.config._name_or_path, subfolder=None).class_names == NAMES  # type: ignore[arg-type]


def test_the_older_name_of_dtype(base: str, light: Model) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Model.from_base(base, NAMES, torch_dtype="float16").clip.dtype == torch.float16
        loaded = Model.from_pretrained(light.config._name_or_path, dtype="float32", torch_dtype="float16")
    assert loaded.clip.dtype == torch.float32
