"""Short preprocessing against the stock processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessor, SiglipImageProcessor, ViTImageProcessor

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.preprocessing import Preprocessor
from taskres_hf.pictures import read_image

Model = TaskResCLIPForImageClassification


def _pictures(splits: Any) -> list[PIL.Image.Image]:
    """Real pictures made awkward: long, tiny, one pixel, grey, and larger."""
    first = splits["test"][0]["image"].convert("RGB")
    second = splits["test"][5]["image"].convert("RGB")
    sizes = [(64, 64), (401, 299), (299, 401), (1000, 70), (70, 1000), (3, 5), (1, 7), (1, 1), (640, 640)]
    found = [(first if number % 2 else second).resize(size, 3) for number, size in enumerate(sizes)]
    noise = np.random.default_rng(0).integers(0, 256, (560, 237, 3), dtype=np.uint8)
    return [*found, first.convert("L").convert("RGB"), PIL.Image.fromarray(noise)]


@pytest.mark.parametrize(
    "processor",
    [
        CLIPImageProcessor(),
        CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}),
        CLIPImageProcessor(size={"height": 48, "width": 80}, do_center_crop=False),
        SiglipImageProcessor(),
        ViTImageProcessor(),
    ],
    ids=["clip", "clip-64", "clip-no-crop", "siglip", "vit"],
)
def test_two_grey_levels_at_most(processor: Any, splits: Any) -> None:
    prepare = Preprocessor(processor)
    assert prepare.fast
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    for picture in _pictures(splits):
        # Of one pixel, older stock processors would take the height for the channels.
        expected = processor(images=[picture], input_data_format="channels_last", return_tensors="pt")["pixel_values"][
            0
        ]
        found = prepare([picture])["pixel_values"][0]
        assert found.shape == expected.shape
        assert ((found - expected) * std * 255).abs().max() <= 2.01, picture.size


def test_draft_decoding_is_coarser_and_only_on_request(model: Model, splits: Any, tmp_path: Path) -> None:
    picture = splits["test"][3]["image"].convert("RGB").resize((1600, 1200), 3)
    picture.save(tmp_path / "large.jpg", quality=90)
    assert read_image(tmp_path / "large.jpg").size == (1600, 1200)
    assert read_image(tmp_path / "large.jpg", draft=(224, 224)).size == (400, 300)
    exact = Embedder(model.clip, model.image_processor)
    coarse = Embedder(model.clip, model.image_processor, draft_decoding=True)
    assert exact.draft is None
    assert exact.key != coarse.key
    pair = [embedder([read_image(tmp_path / "large.jpg", embedder.draft)]) for embedder in (exact, coarse)]
    assert F.cosine_similarity(*pair).min() > 0.99


def test_a_processor_of_another_kind_is_used_as_it_is(splits: Any) -> None:
    processor = CLIPImageProcessor(resample=0)  # nearest neighbour
    picture = splits["test"][0]["image"].convert("RGB").resize((300, 200))
    prepare = Preprocessor(processor)
    assert not prepare.fast
    expected = processor(images=[picture], return_tensors="pt")["pixel_values"]
    assert torch.equal(prepare([picture])["pixel_values"], expected)
    assert not Preprocessor(CLIPImageProcessor(), exact=True).fast


@pytest.mark.parametrize("processor", [CLIPImageProcessor(), SiglipImageProcessor()], ids=["clip", "siglip"])
def test_two_grey_levels_whatever_the_size_and_the_edges(processor: Any) -> None:
    """Noise of 0 and 255: where rounding, clipping and the order of resizing across and down show most."""
    generator = np.random.default_rng(0)
    prepare = Preprocessor(processor)
    prepare.in_bytes = True
    sizes = [tuple(np.exp(generator.uniform(np.log(20), np.log(900), 2)).astype(int)) for _ in range(60)]
    sizes += [(300, 224), (400, 300), (300, 400), (448, 224), (449, 224), (225, 225), (1500, 1100), (700, 3000)]
    for size in sizes:  # the last ones strip after strip
        picture = PIL.Image.fromarray(255 * generator.integers(0, 2, (*size, 3), dtype=np.uint8))
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        expected = processor(images=[picture], **options)["pixel_values"]
        found = prepare([picture])["pixel_values"]
        assert found.dtype == torch.uint8
        assert (found.float() - expected.float()).abs().max() <= 2, size
