"""Goal 8: the peers in one table, each at its published length, in units of one bare fp32 pass.

Every peer's step is run for real and timed; where its published length would take hours, the step is run a few times
and multiplied, and the row says so. They are written here from their papers, for their cost; their accuracy is not
compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from taskres_hf import TaskResCLIPForImageClassification, TaskResTrainer, TaskResTrainingArguments
from taskres_hf.embedding.engines.choose import make_engine
from taskres_hf.embedding.features import ImageFeatures
from taskres_hf.picture_files import find_images
from taskres_hf.pictures import read_image

from .material import clip_folder, jpeg_folder, obstacle
from .timing import PEER, Report

CLASSES, SHOTS, COUNT = 100, 16, 1600


def _seconds(step: Callable[[], object], repeat: int) -> float:
    step()
    start = time.perf_counter()
    for _ in range(repeat):
        step()
    return (time.perf_counter() - start) / repeat


def peers(report: Report) -> None:
    base = clip_folder(32)
    clip = CLIPModel.from_pretrained(base, dtype=torch.float32).eval().requires_grad_(False)
    processor, tokenizer = CLIPImageProcessor(), CLIPTokenizer.from_pretrained(base)
    files = find_images([jpeg_folder(640, (400, 300), 40)])[:32]
    pixels = processor(images=[read_image(file) for file in files], return_tensors="pt")["pixel_values"]
    tokens = tokenizer(
        [f"a photo of a thing number {k}." for k in range(CLASSES)],
        padding="max_length",
        max_length=77,
        return_tensors="pt",
    )
    labels = torch.randint(CLASSES, (32,))

    def tower(batch: Tensor) -> Tensor:
        return clip.get_image_features(pixel_values=batch).pooler_output

    with torch.no_grad():
        batch_pass = _seconds(lambda: tower(pixels), 4)
        text = clip.get_text_features(**tokens).pooler_output
    unit = batch_pass * COUNT / 32  # one bare fp32 pass over the training pictures
    embeds = F.normalize(torch.randn(COUNT, 512), dim=1)
    ids = torch.arange(CLASSES).repeat_interleave(SHOTS)

    # Ours: the engine's passes are measured in `training`; here the epochs alone, beside one fp32 pass.
    model = TaskResCLIPForImageClassification.from_base(base, [f"thing number {k}" for k in range(CLASSES)])
    data = ImageFeatures(embeds[None], ids, model.class_names, "")

    def ours() -> None:
        model.classifier.reset()
        TaskResTrainer(model, TaskResTrainingArguments(recipe="auto-v1", shots=SHOTS, disable_tqdm=True), data).train()

    seconds = _seconds(ours, 1)
    passes = {}
    precisions = [precision for precision in ("bf16", "fp32") if obstacle("torch", precision) is None]
    for precision in precisions:
        engine = make_engine(clip, "torch", precision)
        parts = pixels.split(engine.batch_size)
        with torch.no_grad():
            engine({"pixel_values": parts[0]})
            passes[precision] = _seconds(lambda: [engine({"pixel_values": part}) for part in parts], 4) / batch_pass
    fastest = min(passes.values()) + seconds / unit

    def add(name: str, passes: float, seconds: float, note: str) -> None:
        value = passes + seconds / unit
        report.add(f"{PEER}{name}", [value / fastest], 1.0, True, f"{value:.3g} bare passes; {note}")

    for precision, name in (("bf16", "torch bf16"), ("fp32", "exact fp32")):
        row, note = f"ours, {name}, 200 epochs", "epochs run in full on embeddings of this size"
        if precision in passes:
            add(row, passes[precision], seconds, note)
        else:
            report.skip(f"{PEER}{row}", str(obstacle("torch", precision)))

    from sklearn.linear_model import LogisticRegression

    fit = _seconds(lambda: LogisticRegression(max_iter=1000).fit(embeds.numpy(), ids.numpy()), 1)
    add("scikit-learn logistic regression on fp32 embeddings", 1.0, fit, "run in full")

    def tip_adapter_f() -> Callable[[], None]:
        keys = nn.Parameter(embeds.clone())
        values = F.one_hot(ids, CLASSES).float()
        optimizer = torch.optim.AdamW([keys], lr=1e-3, eps=1e-4)

        def step() -> None:
            with torch.no_grad():
                batch = F.normalize(tower(pixels), dim=1)
            affinity = torch.exp(-5.5 * (1 - batch @ keys.T)) @ values
            loss = F.cross_entropy(100 * batch @ F.normalize(text, dim=1).T + affinity, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    steps = COUNT / 32
    step = _seconds(tip_adapter_f(), 3)
    add("Tip-Adapter-F, 10 cache passes and 20 epochs", 10.0, 20 * steps * step, "extrapolated from 3 steps")

    def published() -> Callable[[], None]:
        residual = nn.Parameter(torch.zeros_like(text))
        optimizer = torch.optim.Adam([residual], lr=2e-3, weight_decay=5e-4)

        def step() -> None:
            with torch.no_grad():
                batch = F.normalize(tower(pixels), dim=1)
            loss = F.cross_entropy(100 * batch @ F.normalize(text + 0.5 * residual, dim=1).T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    step = _seconds(published(), 3)
    add(
        "TaskRes as published, tower every epoch, 200 epochs",
        0.0,
        200 * steps * step,
        "extrapolated from 3 steps of 32",
    )

    def clip_adapter() -> Callable[[], None]:
        adapter = nn.Sequential(nn.Linear(512, 128, bias=False), nn.ReLU(), nn.Linear(128, 512, bias=False), nn.ReLU())
        optimizer = torch.optim.SGD(adapter.parameters(), lr=2e-3)

        def step() -> None:
            with torch.no_grad():
                batch = tower(pixels)
                classes = clip.get_text_features(**tokens).pooler_output  # its code encodes the prompts at every step
            mixed = F.normalize(0.2 * adapter(batch) + 0.8 * batch, dim=1)
            loss = F.cross_entropy(100 * mixed @ F.normalize(classes, dim=1).T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    step = _seconds(clip_adapter(), 1)
    add("CLIP-Adapter, 200 epochs", 0.0, 200 * steps * step, "extrapolated from 1 step")

    def coop() -> Callable[[], None]:
        context = nn.Parameter(0.02 * torch.randn(16, 512))
        optimizer = torch.optim.SGD([context], lr=2e-3)
        hook_input = clip.text_model.embeddings.token_embedding

        def insert(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.cat([output[:, :1], context.expand(len(output), -1, -1), output[:, 17:]], dim=1)

        def step() -> None:
            with torch.no_grad():
                batch = F.normalize(tower(pixels), dim=1)
            handle = hook_input.register_forward_hook(insert)
            classes = clip.get_text_features(**tokens).pooler_output
            handle.remove()
            loss = F.cross_entropy(100 * batch @ F.normalize(classes, dim=1).T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    step = _seconds(coop(), 1)
    add("CoOp, 16 context tokens, 200 epochs", 0.0, 200 * steps * step, "extrapolated from 1 step")

    def clip_lora() -> Callable[[], None]:
        """Rank 2 on q, k, v of both towers, as forward hooks; 500 x shots iterations of 32."""
        parameters = []
        for name, module in clip.named_modules():
            if isinstance(module, nn.Linear) and name.endswith(("q_proj", "k_proj", "v_proj")):
                down = nn.Parameter(0.01 * torch.randn(2, module.in_features))
                up = nn.Parameter(torch.zeros(module.out_features, 2))
                parameters += [down, up]
                module.register_forward_hook(lambda m, i, o, down=down, up=up: o + i[0] @ down.T @ up.T)
        optimizer = torch.optim.AdamW(parameters, lr=2e-4)

        def step() -> None:
            classes = clip.get_text_features(**tokens).pooler_output
            batch = F.normalize(tower(pixels), dim=1)
            loss = F.cross_entropy(100 * batch @ F.normalize(classes, dim=1).T, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        return step

    step = _seconds(clip_lora(), 1)
    add("CLIP-LoRA, 8,000 iterations", 0.0, 500 * SHOTS * step, "extrapolated from 1 step")
