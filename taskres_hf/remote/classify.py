"""Classify pictures with torch, transformers and Pillow alone: python classify.py PICTURE..."""

import json
import sys
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection

here = Path(__file__).parent
labels = json.loads((here / "labels.json").read_text(encoding="utf-8"))
processor = AutoImageProcessor.from_pretrained(here, backend="pil")
tower = CLIPVisionModelWithProjection.from_pretrained(here).eval()
head = load_file(here / "head.safetensors")
known = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
pictures = [ImageOps.exif_transpose(Image.open(name, formats=known)).convert("RGB") for name in sys.argv[1:]]
pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
with torch.no_grad():
    embeds = tower(pixels.to(tower.dtype)).image_embeds.float() + head.get("offset", 0.0)
    logits = torch.nn.functional.normalize(embeds, dim=-1) @ head["weight"].T + head["bias"]
for name, row in zip(sys.argv[1:], logits, strict=True):
    given = [label for label, p in zip(labels, row.sigmoid(), strict=True) if p >= head.get("threshold", 2.0)]
    found = {"labels": given} if "threshold" in head else {"label": labels[int(row.argmax())]}
    print(json.dumps({"file": name, **found, "logits": row.tolist()}))
