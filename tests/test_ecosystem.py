"""Beside other libraries: transformers' Trainer, several processes, remote code, light imports."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import train_both_ways
from datasets import DatasetDict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import forge, random_residual
from transformers import AutoModelForImageClassification, CLIPModel, Trainer, TrainingArguments
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

import taskres_hf
from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.storage import json_digest, parse_tensors, with_metadata

Model = TaskResCLIPForImageClassification
ROOT = Path(__file__).parents[1]


def _python(code: str, *arguments: object, cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True, text=True, check=False, cwd=cwd, env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------------- imports


def test_importing_the_library_or_asking_for_help_loads_no_torch() -> None:
    code = "import sys, {}; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    assert _python(code.format("taskres_hf")).strip() == "[]"
    assert _python(code.format("taskres_hf.cli")).strip() == "[]"


@pytest.mark.parametrize("first", ["taskres_hf", "transformers"])
def test_auto_classes_know_artifacts_in_any_import_order(trained: Path, first: str) -> None:
    second = {"taskres_hf": "transformers", "transformers": "taskres_hf"}[first]
    code = (
        f"import sys, {first}, {second}; from transformers import AutoModelForImageClassification as A; "
        "print(type(A.from_pretrained(sys.argv[1])).__name__)"
    )
    assert _python(code, trained).strip() == "TaskResCLIPForImageClassification"


def test_every_public_name_exists() -> None:
    assert all(getattr(taskres_hf, name) is not None for name in taskres_hf.__all__)
    assert set(taskres_hf.__all__) <= set(dir(taskres_hf))
    with pytest.raises(AttributeError):
        taskres_hf.nonsense  # noqa: B018


# ---------------------------------------------------------------------- transformers.Trainer


def test_transformers_trainer(model: Model, splits: DatasetDict, tmp_path: Path) -> None:
    processor = model.image_processor

    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        inputs = processor(images=[row["image"] for row in rows], return_tensors="pt")
        return {"pixel_values": inputs["pixel_values"], "labels": torch.tensor([row["label"] for row in rows])}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=16, learning_rate=0.1,
        remove_unused_columns=False, save_strategy="epoch", eval_strategy="epoch", report_to=[], use_cpu=True,
        load_best_model_at_end=True, metric_for_best_model="accuracy", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, data_collator=collate, train_dataset=splits["train"].select(range(48)),
        eval_dataset=splits["validation"].select(range(16)),
        compute_metrics=lambda p: {"accuracy": float(np.mean(p.predictions.argmax(1) == p.label_ids))},
    )  # fmt: skip
    before = {name: value.clone() for name, value in model.clip.state_dict().items()}
    trainer.train()
    assert model.classifier.residual.any()
    assert all(torch.equal(before[name], value) for name, value in model.clip.state_dict().items())
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        with safe_open(checkpoint / "model.safetensors", framework="pt") as stream:
            assert list(stream.keys()) == ["residual"]
        assert isinstance(AutoModelForImageClassification.from_pretrained(checkpoint), Model)
    best = AutoModelForImageClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert torch.equal(best.classifier.residual, model.classifier.residual)
    trainer.args.num_train_epochs = 3
    trainer.train(resume_from_checkpoint=str(checkpoints[-1]))
    assert trainer.state.epoch == 3


def test_what_transformers_trainer_saves_keeps_the_head(model: Model, tmp_path: Path) -> None:
    """Its gradient is autograd's, so it trains whatever the head computes; its checkpoints hold all of it."""
    head = model.classifier
    head.set_weight(torch.randn(8, 192), class_bias=torch.ones(8), normalize_weight=False, logit_scale_factor=0.5)
    head.strength = 0.5
    rows = [{"image_embeds": torch.randn(192), "labels": number % 8} for number in range(16)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, save_steps=2, learning_rate=0.1, remove_unused_columns=False,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    before = head.residual.detach().clone()
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(head.residual, before)
    loaded, images = Model.from_pretrained(tmp_path / "checkpoint-2"), torch.randn(4, 192)
    assert torch.equal(loaded(image_embeds=images).logits, model(image_embeds=images).logits)


# ---------------------------------------------------------------------- several processes


def test_two_processes_reach_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, train_both_ways.__file__, str(tmp_path / "2")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for mode, *of_two in map(json.loads, done.stdout.splitlines()[-2:]):
        of_one = train_both_ways.train(tmp_path / "1", mode)
        assert (of_one[0], of_two[0]) == (1, 2)
        assert of_one[1] == pytest.approx(of_two[1], abs=1e-9), mode
        assert of_one[2] == pytest.approx(of_two[2], abs=1e-4), mode
        residuals = [Model.from_pretrained(tmp_path / count / mode).classifier.residual for count in ("1", "2")]
        torch.testing.assert_close(*residuals, atol=1e-3, rtol=1e-3)
        assert (tmp_path / "2" / mode / "checkpoint-12" / "trainer_state.json").exists()


# ---------------------------------------------------------------------- without the library


# Nothing of the library can be imported, as on a machine without it.
_WITHOUT_THE_LIBRARY = """
import sys, builtins
real = builtins.__import__
def guarded(name, *rest, **more):
    if name.split(".")[0] in ("taskres_hf", "datasets", "typer"):
        raise ImportError(name)
    return real(name, *rest, **more)
builtins.__import__ = guarded
import torch
torch.set_num_threads(1)  # as here: sums are in the same order
from transformers import AutoModelForImageClassification, pipeline
"""
_SERVE = (
    _WITHOUT_THE_LIBRARY
    + """
for line in sys.argv[2:]:
    name, pixels, answers = line.split("|")
    model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
    assert "transformers_modules" in type(model).__module__
    inputs = torch.load(pixels, weights_only=True)
    torch.save(model(**inputs).logits.detach(), answers)
    if sys.argv[1] == "pipeline":
        classes = pipeline("image-classification", model=name, trust_remote_code=True).model.config.id2label
        assert len(classes) == model.table.shape[0]
"""
)


def _tiny_siglip(base: str, folder: Path) -> str:
    """A SigLIP of random weights with a real tokenizer: its text is padded to a fixed length."""
    from support import tiny_config
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    config = tiny_config("siglip")
    config.text_config.vocab_size = 8192
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    processor.size = processor.crop_size = {"height": 32, "width": 32}
    processor.save_pretrained(folder)
    return str(folder)


def test_remote_code_gives_the_same_logits_without_the_library(
    hub: Any, base: str, spec: dict[str, Any], pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    hub.add_folder("tester/tiny-clip", base)
    names, several = spec["classes"], ["a photo of a {}.", "art of the {}."]
    described = {name: [f"A {name}, seen from near.", "It is there."] for name in names}
    online = random_residual(Model.from_base("tester/tiny-clip", names, spec["template"]))
    online.push_to_hub("tester/with-code", include_code=True)
    models = {
        "text": random_residual(Model.from_base(base, names, several, prompt_average="normalized")),
        "image": random_residual(Model.from_base(base, names, several, residual_side="image", alpha=0.25)),
        "described": random_residual(Model.from_base(base, names, class_descriptions=described)),
        "enhanced": random_residual(Model.from_base(base, names)),
        "bf16": random_residual(Model.from_base(base, names, dtype="bfloat16")),
        "written": Model.from_base(base, names),
        "half": random_residual(Model.from_base(base, names)),
        "half-image": random_residual(Model.from_base(base, names, residual_side="image")),
        "none": random_residual(Model.from_base(base, names)),
    }
    if TOKENIZER_MAPPING_NAMES.get("siglip"):  # in transformers 5.2 only with sentencepiece
        models["siglip"] = random_residual(Model.from_base(_tiny_siglip(base, tmp_path / "tiny-siglip"), names))
    bias, rows = torch.linspace(-3, 3, len(names)), torch.randn(len(names), 192)
    models["written"].classifier.set_weight(rows, class_bias=bias, normalize_weight=False, logit_scale_factor=0.3)
    for name in ("half", "half-image", "none"):
        head = models[name].classifier
        head.class_bias, head.shift, head.logit_scale_factor = bias, torch.randn_like(head.base), 1.75
        head.strength = 0.0 if name == "none" else 0.5
    models["enhanced"].classifier.shift = torch.randn_like(models["enhanced"].classifier.base)
    expected, lines = {}, []
    for name, model in {**models, "tester/with-code": online}.items():
        place = name if model is online else str(tmp_path / name)
        if model is not online:
            model.save_pretrained(place, include_code=True)
            assert {file.name for file in Path(place).glob("*.py")} == {"modeling_taskres.py"}
        size = model.clip.config.vision_config.image_size
        pixels = torch.nn.functional.interpolate(pixel_values, size=(size, size))
        expected[name] = model(pixel_values=pixels).logits
        stem = tmp_path / name.replace("/", "-")
        torch.save({"pixel_values": pixels}, f"{stem}.pixels")
        lines.append(f"{place}|{stem}.pixels|{stem}.logits")
    _python(_SERVE, "pipeline", *lines, cwd=tmp_path)
    for name, logits in expected.items():
        found = torch.load(f"{tmp_path / name.replace('/', '-')}.logits", weights_only=True)
        assert torch.equal(found, logits), name


def test_remote_code_refuses_what_the_library_refuses(base: str, spec: dict[str, Any], tmp_path: Path) -> None:
    random_residual(Model.from_base(base, spec["classes"])).save_pretrained(tmp_path / "a", include_code=True)
    changed = CLIPModel.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        changed.vision_model.encoder.layers[2].mlp.fc1.weight.mul_(1.3)
    changed.save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "other" / name).write_bytes((Path(base) / name).read_bytes())
    told = json.loads((shutil.copytree(base, tmp_path / "told") / "config.json").read_text())
    told["vision_config"]["hidden_act"] = "gelu"
    (tmp_path / "told" / "config.json").write_text(json.dumps(told))
    for name in ("flipped", "renamed", "stronger", "biased"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    forge(tmp_path / "stronger", strength=2, format_version=3)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    save_file({**tensors, "class_bias": torch.ones(8)}, tmp_path / "biased" / "model.safetensors")
    content = bytearray((tmp_path / "flipped" / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "flipped" / "model.safetensors").write_bytes(content)
    config = json.loads((tmp_path / "renamed" / "config.json").read_text())
    forge(tmp_path / "renamed", id2label={**config["id2label"], "0": "wolf"})
    for name, file in (("edited", "config.json"), ("prepared", "preprocessor_config.json")):
        shutil.copytree(tmp_path / "a", tmp_path / name)
        values = json.loads((tmp_path / name / file).read_text())
        values["alpha" if name == "edited" else "image_mean"] = 0.9 if name == "edited" else [0.0, 0.0, 0.0]
        (tmp_path / name / file).write_text(json.dumps(values))
    shutil.copytree(tmp_path / "prepared", tmp_path / "cut")  # a save was cut before it replaced the processor
    weights = (tmp_path / "a" / "model.safetensors").read_bytes()
    replaces = {"replaces": json.dumps({"preprocessor_config.json": json_digest(values)})}
    weights = with_metadata(weights, {**parse_tensors(weights, "a")[1], **replaces})
    (tmp_path / "cut" / "model.safetensors").write_bytes(weights)
    shutil.copytree(tmp_path / "a", tmp_path / "both")  # the same edit in both places, the checksum left as it was
    for file, old in (("config.json", b'"alpha": 0.5'), ("model.safetensors", rb"\"alpha\": 0.5")):
        content = (tmp_path / "both" / file).read_bytes()
        assert old in content
        (tmp_path / "both" / file).write_bytes(content.replace(old, old[:-1] + b"6"))
    code = (
        _WITHOUT_THE_LIBRARY
        + """
for name, options, words in (
    ("flipped", {}, "checksum"), ("renamed", {}, "classes or templates"), ("a", {"base_model": "other"}, "image tower"),
    ("a", {"base_model": "told"}, "image tower"),
    ("edited", {}, "config.json was changed"), ("prepared", {}, "preprocessor_config.json was changed"),
    ("cut", {}, "preprocessor_config.json was changed"), ("both", {}, "checksum of model.safetensors"),
    ("stronger", {}, "strength"), ("a", {"strength": -1}, "strength"), ("biased", {}, "checksum"),
):
    try:
        AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True, **options)
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(name)
model = AutoModelForImageClassification.from_pretrained("a", trust_remote_code=True, strength=0.5)
assert model.strength == 0.5
images = torch.randn(3, 192)
half, model.strength = model(image_embeds=images).logits, 1.0
assert not torch.allclose(model(image_embeds=images).logits, half)
try:
    model.save_pretrained("again")
except RuntimeError as error:
    print(error)
"""
    )
    assert "pip install taskres_hf" in _python(code, cwd=tmp_path)
