"""What the benchmarks run on: CLIP of published sizes with random weights, and JPEG files of web and camera size.

Random weights cost what trained ones cost; accuracy is measured elsewhere, on the shipped checkpoint.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from taskres_hf.demo import demo_dataset, demo_model
from taskres_hf.embedding.engines.choose import make_engine
from taskres_hf.errors import ConfigurationError, MissingExtraError
from taskres_hf.machine import is_faster

OUT = Path(__file__).parent / "out"


def clip_folder(patch: int = 32) -> str:
    """A ViT-B CLIP (D = 512) with random weights and the shipped tokenizer."""
    folder = OUT / f"vit-b-{patch}"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        text = {"vocab_size": 49408, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": 2}
        vision = {"patch_size": patch, "image_size": 224, "hidden_size": 768, "num_hidden_layers": 12}
        vision |= {"num_attention_heads": 12, "intermediate_size": 3072}
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
        with torch.no_grad():
            model.logit_scale.fill_(4.6)
        model.save_pretrained(folder)
        CLIPImageProcessor().save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((Path(demo_model()) / name).read_bytes())
    return str(folder)


@cache
def obstacle(engine: str, precision: str) -> str | None:
    """Why a way to run the tower cannot be measured on this machine, or None."""
    if precision == "bf16" and not is_faster(torch.bfloat16):
        return "this processor does not multiply bf16 faster than fp32"
    try:
        make_engine(CLIPModel.from_pretrained(demo_model(), dtype=torch.float32).eval(), engine, precision)
    except (ConfigurationError, MissingExtraError) as error:
        return str(error)
    return None


def jpeg_folder(count: int, size: tuple[int, int], classes: int = 100) -> Path:
    """`count` JPEG files in class folders, made of the shipped pictures, enlarged and roughened."""
    folder = OUT / f"jpeg-{size[0]}x{size[1]}-{count}-{classes}"
    if not folder.exists():
        rows = demo_dataset("people")["train"]
        generator = np.random.default_rng(0)
        for number in range(count):
            picture = rows[number % len(rows)]["image"].convert("RGB").resize(size, PIL.Image.Resampling.BICUBIC)
            noise = generator.integers(-12, 12, (size[1], size[0], 3), dtype=np.int16)
            pixels = np.clip(np.asarray(picture, dtype=np.int16) + noise, 0, 255).astype(np.uint8)
            place = folder / f"class {number % classes:04d}"
            place.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(pixels).save(place / f"{number}.jpg", quality=90)
    return folder
