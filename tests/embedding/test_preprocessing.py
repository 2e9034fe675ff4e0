"""Short preprocessing against the stock processors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
import transformers
from datasets import Dataset, Features, Image, Value

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.data.labelled import LabelledImages
from taskres_hf.embedding.embedder import Embedder
from taskres_hf.embedding.features import embed_images
from taskres_hf.embedding.preprocessing import CROPS, Preprocessor
from taskres_hf.errors import ConfigurationError, ImageError
from taskres_hf.pictures import read_image

Model = TaskResCLIPForImageClassification


def _of_pillow(name: str) -> Any:
    """The processor that resizes with Pillow, whether torchvision is installed or not."""
    return getattr(transformers, f"{name}Pil", None) or getattr(transformers, name)


CLIPImageProcessor = _of_pillow("CLIPImageProcessor")
SiglipImageProcessor = _of_pillow("SiglipImageProcessor")
ViTImageProcessor = _of_pillow("ViTImageProcessor")


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
        ViTImageProcessor(image_mean=0.4, image_std=0.3),
    ],
    ids=["clip", "clip-64", "clip-no-crop", "siglip", "vit", "one number for all channels"],
)
def test_two_grey_levels_at_most(processor: Any, splits: Any) -> None:
    prepare = Preprocessor(processor)
    assert prepare.fast
    std = torch.tensor(processor.image_std).expand(3).view(3, 1, 1)
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
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
    sizes = [tuple(np.exp(generator.uniform(np.log(20), np.log(900), 2)).astype(int)) for _ in range(60)]
    sizes += [(300, 224), (400, 300), (300, 400), (448, 224), (449, 224), (225, 225), (1500, 1100), (700, 3000)]
    for size in sizes:  # the last ones strip after strip
        picture = PIL.Image.fromarray(255 * generator.integers(0, 2, (*size, 3), dtype=np.uint8))
        options = {"do_rescale": False, "do_normalize": False, "return_tensors": "pt"}
        expected = processor(images=[picture], **options)["pixel_values"]
        found = 255 * (prepare([picture])["pixel_values"] * std + mean)
        assert (found - expected.float()).abs().max() <= 2.01, size


# ---------------------------------------------------------------------- long pictures, and where the crop is


@pytest.mark.parametrize("size", [(10_000, 1), (1, 10_000), (30_000, 7), (3, 60_000)])
def test_a_long_thin_picture_takes_no_more_than_the_crop(size: tuple[int, int], monkeypatch: Any) -> None:
    made: list[int] = []
    real = PIL.Image.Image.resize

    def resize(self: PIL.Image.Image, target: Any, *rest: Any, **options: Any) -> PIL.Image.Image:
        made.append(target[0] * target[1])
        return real(self, target, *rest, **options)

    generator = np.random.default_rng(0)
    picture = PIL.Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    prepare = Preprocessor(CLIPImageProcessor())
    monkeypatch.setattr(PIL.Image.Image, "resize", resize)
    values = prepare([picture])["pixel_values"]
    assert values.shape == (1, 3, 224, 224)
    assert max(made) <= 224 * 224
    # The same as the middle of the whole: cut first, with more than the filter reaches, then scaled.
    side, middle = min(size), max(size) // 2
    reach = 4 * side + 8 + (middle - side // 2) % 2
    box = (middle - reach, 0, middle + reach, side) if size[0] > size[1] else (0, middle - reach, side, middle + reach)
    expected = prepare([picture.crop(box)])["pixel_values"]
    assert (values - expected).abs().mean() < 0.35


def test_resizing_only_what_the_crop_keeps_changes_nothing(splits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from taskres_hf.embedding import preprocessing

    prepare = Preprocessor(CLIPImageProcessor())
    pictures = [splits["test"][0]["image"].convert("RGB").resize(size) for size in ((90, 40), (31, 120), (200, 199))]
    whole = prepare(pictures)["pixel_values"]
    monkeypatch.setattr(preprocessing, "_LARGEST_WHOLE", 0)
    std = torch.tensor(CLIPImageProcessor().image_std).view(3, 1, 1)
    assert (255 * std * (prepare(pictures)["pixel_values"] - whole)).abs().max() <= 2.01  # grey levels


@pytest.mark.parametrize("options", [{"exact": True}, {"exact": True, "crop": "torchvision"}])
def test_the_stock_processor_is_not_given_what_would_take_gigabytes(options: Any) -> None:
    prepare = Preprocessor(CLIPImageProcessor(), **options)
    with pytest.raises(ImageError, match=r"100000x1 would be scaled to 22400000x224.*Crop it"):
        prepare([PIL.Image.new("RGB", (100_000, 1))])
    assert prepare([PIL.Image.new("RGB", (300, 20))])["pixel_values"].shape == (1, 3, 224, 224)
    uncropped = Preprocessor(CLIPImageProcessor(do_center_crop=False))
    with pytest.raises(ImageError, match="gigabytes"):
        uncropped.check(PIL.Image.new("RGB", (100_000, 1)))


def test_a_picture_that_is_too_long_is_named_and_skipped(model: Model, splits: Any) -> None:
    pictures = [splits["test"][0]["image"].convert("RGB"), PIL.Image.new("RGB", (100_000, 1))]
    images = LabelledImages(
        Dataset.from_dict(
            {"image": pictures, "label": ["a", "b"]}, Features({"image": Image(), "label": Value("string")})
        )
    )
    embedder = Embedder(model.clip, model.image_processor, exact_preprocessing=True)
    with pytest.warns(UserWarning, match=r"(?s)1 of 2 .*Row 1: .*100000x1"):
        assert embed_images(embedder, images, on_error="skip", progress=False).skipped == (1,)


def _torchvision_crop(picture: PIL.Image.Image, side: int) -> PIL.Image.Image:
    """`Resize(side)` and `CenterCrop(side)` of torchvision's transforms, from its source: round() is half to even."""
    short, long = sorted(picture.size)
    longer = int(side * long / short)
    size = (side, longer) if picture.width <= picture.height else (longer, side)
    resized = picture.resize(size, PIL.Image.Resampling.BICUBIC)
    left, top = round((resized.width - side) / 2.0), round((resized.height - side) / 2.0)
    return resized.crop((left, top, left + side, top + side))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("surplus", [0, 1, 2, 3, 5, 7, 11])
def test_the_crop_of_torchvision(exact: bool, surplus: int, splits: Any) -> None:
    """One pixel off transformers' where (long side - 224) mod 4 is 3."""
    side = 32
    processor = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    picture = splits["test"][0]["image"].convert("RGB").resize((side + surplus, side))
    expected = processor(images=[_torchvision_crop(picture, side)], return_tensors="pt")["pixel_values"]
    found = {crop: Preprocessor(processor, exact, crop)([picture])["pixel_values"] for crop in CROPS}
    assert (found["torchvision"] - expected).abs().max() * 0.28 <= 2.01 / 255
    assert torch.equal(found["torchvision"], found["processor"]) == (surplus % 4 != 3)
    fast = Preprocessor(processor, crop="torchvision")
    assert fast.fast
    view = [picture.resize((side, side))]  # has the tower's size: nothing is cropped
    both = [Preprocessor(processor, exact, crop)(view, augmented=True)["pixel_values"] for crop in CROPS]
    assert torch.equal(*both)


def test_the_crop_is_part_of_the_key(model: Model) -> None:
    keys = [Embedder(model.clip, model.image_processor, crop=crop).key for crop in CROPS]
    assert keys[0] != keys[1]
    with pytest.raises(ConfigurationError, match="`crop` must be one of"):
        Embedder(model.clip, model.image_processor, crop="centre")


# ---------------------------------------------------------------------- the two back ends of transformers


def _of_both_back_ends(base: str) -> list[Any]:
    """The processor that resizes with Pillow, and the one that is taken where torchvision is installed."""
    pytest.importorskip("torchvision")
    processors = [CLIPImageProcessor.from_pretrained(base), transformers.AutoImageProcessor.from_pretrained(base)]
    assert type(processors[0]) is not type(processors[1])
    return processors


@pytest.mark.parametrize("exact", [False, True], ids=["short way", "stock way"])
def test_the_back_ends_with_and_without_torchvision_agree(base: str, splits: Any, exact: bool) -> None:
    # The stock processors of older transformers take the height of such small pictures for the channels.
    pictures = [picture for picture in _pictures(splits) if min(picture.size) > 3 or not exact]
    found = []
    for processor in _of_both_back_ends(base):
        prepare = Preprocessor(processor, exact=exact)
        assert prepare.fast is not exact
        found.append([prepare([picture])["pixel_values"] for picture in pictures])
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    for picture, of_pillow, of_torchvision in zip(pictures, *found, strict=True):
        assert ((of_pillow - of_torchvision) * std * 255).abs().max() <= 2.01, picture.size


def test_answers_do_not_depend_on_torchvision(model: Model, base: str, splits: Any) -> None:
    found = []
    for processor in _of_both_back_ends(base):
        found.append(Embedder(model.clip, processor)(_pictures(splits)))
    assert F.cosine_similarity(*found).min() > 0.999
