"""Serves a TaskRes classifier where the library `taskres_hf` is not installed (`trust_remote_code=True`).

One file, on torch, transformers and safetensors alone: it reads an artifact (config.json, model.safetensors), loads the
frozen base model that the artifact names, makes the base classifier from the class prompts, checks that it is the one
the residual was trained on, and classifies. Training, saving and everything else: `pip install taskres_hf`.
"""

import hashlib
import json
import math
import os
import re
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.hub import cached_file

_FORMAT_VERSION = 3
_TOLERANCE = {"float32": 2e-3, "float16": 5e-3, "bfloat16": 2e-2}
_IMAGE_TOLERANCE = {"float32": 1e-4, "float16": 2e-3, "bfloat16": 1e-2}
# Families whose text is padded to a fixed number of tokens and has no mask; all others pad to the longest, with one.
_FIXED_LENGTH = {"siglip": 64, "siglip2": 64}
_FAMILIES = {
    "clip", "metaclip_2", "altclip", "chinese_clip", "blip", "vision-text-dual-encoder", "align", *_FIXED_LENGTH,
}  # fmt: skip


class TaskResConfig(PreTrainedConfig):
    """The content of config.json, as it is; `id2label` holds the classes."""

    model_type = "taskres"


class TaskResCLIPForImageClassification(PreTrainedModel):
    """`weight_k = t_k + alpha * x_k` over the image embeddings of a frozen dual encoder (TaskRes, arXiv 2211.10277).

    `strength`, from 0 (zero-shot) to 1 (as trained), can be set at any time.
    """

    config_class = TaskResConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config, base=None, table=None, tensors=None):
        super().__init__(config)
        if base is None:
            raise ValueError("A TaskRes model needs its base model: use from_pretrained(folder_or_repo).")
        self.clip = base.requires_grad_(False)
        self.register_buffer("table", table, persistent=False)
        for name in ("base_shift", "class_bias"):
            self.register_buffer(name, tensors.get(name), persistent=False)
        self.residual = torch.nn.Parameter(tensors["residual"], requires_grad=False)
        self.post_init()
        self.eval()

    def init_weights(self):
        """Nothing to do: every weight is read."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, config=None, revision=None, subfolder="", **kwargs):
        """Load an artifact and its base.

        `base_model=` is another place for the base, `dtype=` what it runs in, `strength=` goes before the stored one.
        """
        name = str(pretrained_model_name_or_path)
        hub = {k: kwargs.pop(k) for k in ("cache_dir", "force_download", "local_files_only", "token") if k in kwargs}
        where = {**hub, "revision": revision, "subfolder": subfolder}
        config_path = cached_file(name, "config.json", **where)
        if commit := re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", config_path):
            where["revision"] = commit.group(1)  # all files of one commit
        weights_path = cached_file(name, "model.safetensors", **where)
        optional = {"_raise_exceptions_for_missing_entries": False}
        config, tensors = read_artifact(
            config_path, weights_path, cached_file(name, "preprocessor_config.json", **where, **optional)
        )
        base_name = _base_name(config, kwargs.pop("base_model", None), local=os.path.isdir(name))
        pinned = {} if os.path.isdir(base_name) else {"revision": config.base_model_revision}
        pinned["subfolder"] = getattr(config, "base_model_subfolder", None) or ""
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None) or "auto"
        dtype = config.dtype if dtype == "auto" else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        base = AutoModel.from_pretrained(base_name, dtype=torch.float32, use_safetensors=True, **pinned, **hub).eval()
        if base.config.model_type not in _FAMILIES:
            raise ValueError(f"The base {base_name} is of the family {base.config.model_type}: install taskres_hf.")
        tokenizer = AutoTokenizer.from_pretrained(base_name, **pinned, **hub)
        prompts = class_prompts(config)
        table = base_classifier(base, tokenizer, prompts, config.prompt_average)
        check_fingerprint(base, table, prompts, config, base_name)
        config.logit_scale, config.logit_bias = score_parameters(base)
        config._name_or_path = name
        model = cls(config, base.to(dtype), table, {key: tensor.float() for key, tensor in tensors.items()})
        if kwargs.get("strength") is not None:
            model.strength = kwargs["strength"]
        notes = {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return (model, notes) if kwargs.get("output_loading_info") else model

    @property
    def strength(self):
        """From 0 (the zero-shot classifier) to 1 (as trained)."""
        return self.config.strength

    @strength.setter
    def strength(self, value):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"strength must be a number from 0 to 1; got {value!r}.")
        self.config.strength = float(value)

    def forward(self, pixel_values=None, image_embeds=None, labels=None, return_dict=None, **kwargs):
        """Logits [N, K] fp32 of pictures [N, 3, H, W] or of their embeddings [N, D]; `labels` [N] add the loss."""
        if image_embeds is None:
            names = ("pixel_attention_mask", "spatial_shapes", "interpolate_pos_encoding")
            inputs = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
            image_embeds = _pooled(self.clip.get_image_features(pixel_values.to(self.clip.dtype), **inputs))
        config, strength = self.config, self.config.strength
        image_embeds, shared = image_embeds.to(self.residual), strength * config.alpha * self.residual
        frozen = self.table if self.base_shift is None else self.table + strength * self.base_shift
        if config.residual_side == "image":
            image_embeds, weight = image_embeds + shared, frozen
        else:
            weight = frozen + shared
        rows = weight if config.normalize_weight else frozen  # whose lengths the rows are divided by
        rows = weight / rows.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        scale = config.logit_scale * config.logit_scale_factor**strength
        logits = scale * F.normalize(image_embeds, dim=-1) @ rows.T + config.logit_bias
        if self.class_bias is not None:
            logits = logits + strength * self.class_bias
        several = config.problem_type == "multi_label_classification"
        if several and strength != 1:
            raise ValueError(f"A classifier of several labels per picture is served at strength 1; it is {strength}.")
        loss = None
        if labels is not None and several:
            loss = F.binary_cross_entropy_with_logits(logits, labels.to(logits))
        elif labels is not None:
            loss = F.cross_entropy(logits, labels)
        output = ImageClassifierOutput(loss=loss, logits=logits)
        return output if return_dict or return_dict is None else output.to_tuple()

    def save_pretrained(self, *args, **kwargs):
        """Refused: without the library an artifact cannot be checked, and the base would be saved with it."""
        raise RuntimeError("Saving needs the library: pip install taskres_hf. To copy a classifier, copy its files.")


def read_artifact(config_path, weights_path, processor_path=None):
    """The config and the tensors of an artifact, verified; ValueError where they are damaged or too new."""
    values = json.loads(Path(config_path).read_text(encoding="utf-8"))
    if values.get("format_version", 1) > _FORMAT_VERSION:
        raise ValueError(f"{config_path} was made by a newer taskres_hf: install it and load the classifier with it.")
    with safe_open(weights_path, framework="pt") as stream:
        tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118
        metadata = stream.metadata() or {}
    if "sha256" in metadata:
        processor = None if processor_path is None else json.loads(Path(processor_path).read_text(encoding="utf-8"))
        values = check_whole(values, processor, tensors, metadata)
    elif "processor_sha256" in values:
        raise ValueError(f"{weights_path} has lost its checksum: download it again.")
    digests = [_digest(tensors[key]) for key in ("residual", "base_shift", "class_bias") if key in tensors]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    if values.get("residual_sha256") != digest:
        raise ValueError(f"The checksum of {weights_path} is not the one in config.json: download both again.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()):
        raise ValueError(f"{weights_path} holds NaN or infinite values.")
    defaults = {"residual_side": "text", "prompt_average": "raw", "underscores": "replace", "logit_bias": 0.0}
    defaults |= {"strength": 1.0, "logit_scale_factor": 1.0, "normalize_weight": True}
    config = TaskResConfig.from_dict({**defaults, "base_model_revision": None, **values})
    shape = [1 if config.residual_side == "image" else len(config.id2label), config.projection_dim]
    if list(tensors["residual"].shape) != shape:
        raise ValueError(f"{weights_path} holds a residual {list(tensors['residual'].shape)}, not {shape}.")
    if "class_bias" in tensors and list(tensors["class_bias"].shape) != [len(config.id2label)]:
        raise ValueError(f"{weights_path} holds a class bias {list(tensors['class_bias'].shape)}.")
    for key, low, high in (("strength", 0, 1), ("logit_scale_factor", 1e-6, 1e6), ("normalize_weight", False, True)):
        value = getattr(config, key)
        number = isinstance(value, (int, float)) and isinstance(value, bool) == isinstance(low, bool)
        if not number or not low <= value <= high:
            raise ValueError(f"{config_path}: {key} must be from {low} to {high}; it is {value!r}.")
    return config, tensors


def check_whole(values, processor, tensors, metadata):
    """The config; ValueError where weights, config or processor are not as they were saved together."""
    kinds = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    parts = [json.dumps(sorted((key, text) for key, text in metadata.items() if key != "sha256")).encode()]
    for name, tensor in sorted(tensors.items()):
        parts.append(json.dumps([name, kinds.get(tensor.dtype), list(tensor.shape)]).encode())
        parts.append(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest = hashlib.sha256(b"".join(b"%d " % len(part) + part for part in parts)).hexdigest()
    if digest != metadata["sha256"]:
        raise ValueError("The checksum of model.safetensors is not that of its content: download it again.")
    config, replaces = json.loads(metadata["config"]), json.loads(metadata.get("replaces", "{}"))
    files = {"config.json": (config, values)}
    files["preprocessor_config.json"] = (json.loads(metadata.get("processor", "null")), processor)
    for file, pair in files.items():
        stored, found = (None if x is None else _json_digest(x) for x in pair)
        cut = file == "config.json" and replaces.get(file) == found  # a save was cut short, and nobody else reads this
        if stored != found and not cut:
            raise ValueError(f"{file} was changed after the classifier was saved: restore it, or download it again.")
    return config


def _json_digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _digest(tensor):
    raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + raw).hexdigest()


def _base_name(config, base_model, local):
    """Where the base is; a path in a downloaded artifact is not followed."""
    if base_model is not None:
        return str(base_model)
    name = str(config.base_model_name_or_path)
    if not local and (os.path.exists(name) or os.path.isabs(name) or ".." in name or name.count("/") > 1):
        raise ValueError(f"The artifact was downloaded and names the path {name!r} as its base: pass base_model=.")
    return name


def class_prompts(config):
    """K lists of prompts: every template with the class's name in it, then the class's own sentences."""
    prompts = []
    for index in range(len(config.id2label)):
        name = config.id2label[index]
        words = (getattr(config, "prompt_names", None) or {}).get(name, name)
        words = words.replace("_", " ") if config.underscores == "replace" else words
        described = getattr(config, "class_descriptions", None) or {}
        sentences = [template.replace("{}", words) for template in config.templates]
        prompts.append(sentences + list(described.get(name, described.get(words)) or []))
    return prompts


@torch.no_grad()
def base_classifier(base, tokenizer, prompts, average):
    """`t` [K, D] fp32: the text embeddings of each class's prompts, averaged raw or as unit vectors."""
    flat = [prompt for group in prompts for prompt in group]
    fixed, text = _FIXED_LENGTH.get(base.config.model_type), base.config.text_config
    positions = getattr(text, "max_position_embeddings", None)
    if text.model_type in ("xlm-roberta", "altclip_text_model"):
        positions -= text.pad_token_id + 1  # RoBERTa counts positions from after the padding index
    limit = min(length for length in (fixed, positions, tokenizer.model_max_length) if length)
    embeddings = []
    for start in range(0, len(flat), 256):
        tokens = tokenizer(
            flat[start : start + 256], padding="max_length" if fixed else "longest", truncation=True, max_length=limit,
            return_tensors="pt",
        )  # fmt: skip
        mask = {} if fixed else {"attention_mask": tokens["attention_mask"]}
        embeddings.append(_pooled(base.get_text_features(tokens["input_ids"], **mask)).float())
    rows = []
    for group in torch.cat(embeddings).split([len(group) for group in prompts]):
        if average == "raw":
            rows.append(group.mean(dim=0))
        else:
            direction = F.normalize(F.normalize(group, dim=-1).mean(dim=0), dim=-1)
            rows.append(direction * group.norm(dim=-1).mean())
    return torch.stack(rows)


def check_fingerprint(base, table, prompts, config, name):
    """ValueError where the base or the prompts are not those the residual was trained on."""
    stored = config.base_fingerprint
    text = json.dumps([config.prompt_average, prompts], ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != stored["prompts_sha256"]:
        raise ValueError("The classes or templates in config.json are not those the residual was trained with.")
    generator = torch.Generator().manual_seed(20221121)
    left, right = (torch.randn(8, size, generator=generator, dtype=torch.float64) for size in table.shape)
    sketch = torch.einsum("sk,kd,sd->s", left, table.double() / table.double().norm(), right)
    gap = float((sketch - torch.tensor(stored["sketch"], dtype=torch.float64)).abs().max())
    gap = max(gap, abs(float(table.norm()) / stored["norm"] - 1.0))
    if list(table.shape) != stored["shape"] or gap > _TOLERANCE.get(stored.get("dtype", "float32"), 2e-2):
        raise ValueError(f"The base {name} no longer gives the text embeddings of training (difference {gap:.2g}).")
    image = stored.get("image")
    if image:
        gap = float((image_sketch(base) - torch.tensor(image["sketch"], dtype=torch.float64)).abs().max())
        told, settings = getattr(base.config, "vision_config", base.config), image.get("settings") or {}
        changed = any(getattr(told, key, value) != value for key, value in settings.items())
        if changed or gap > _IMAGE_TOLERANCE.get(image.get("dtype"), 2e-2):
            raise ValueError(f"The image tower of the base {name} is not the one of training ({gap:.2g}, or settings).")


def image_sketch(base):
    """Eight random projections of 64 elements of each weight of the image tower, in units of their mean square."""
    totals, count = torch.zeros(8, dtype=torch.float64), 0
    for name, weight in sorted(base.state_dict().items()):
        if name.startswith(("text_", "logit_", "temperature")) or not weight.is_floating_point():
            continue
        flat = weight.detach().reshape(-1)
        starts = sorted({max(flat.numel() - 8, 0) * block // 7 for block in range(8)})
        sample = torch.cat([flat[start : start + 8] for start in starts]).double().cpu()
        scale = max(float(sample.pow(2).mean().sqrt()), 1e-4)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        directions = torch.randn(8, len(sample) + 1, generator=generator, dtype=torch.float64)
        totals += directions[:, :-1] @ sample / (scale * math.sqrt(len(sample))) + directions[:, -1] * math.log(scale)
        count += 1
    return totals / math.sqrt(count)


def score_parameters(base):
    """Factor and bias that turn a cosine into the base's own logit."""
    if base.config.model_type == "align":
        return 1.0 / float(base.temperature), 0.0
    return float(base.logit_scale.float().exp()), float(getattr(base, "logit_bias", 0.0) or 0.0)


def _pooled(features):
    return features if isinstance(features, torch.Tensor) else features.pooler_output
