"""Checkpoints of the published code: imported exactly, and nothing in them is executed."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from support import random_residual, run

from taskres_hf import TaskResCLIPForImageClassification
from taskres_hf.errors import ArtifactError, BaseMismatchError
from taskres_hf.paper.checkpoints import import_checkpoint, read_checkpoint

Model = TaskResCLIPForImageClassification


def _save(path: Path, base: torch.Tensor, residual: torch.Tensor, **more: Any) -> Path:
    """A checkpoint as the published trainer writes it: its scheduler state holds scheduler and optimiser objects."""
    parameter = torch.nn.Parameter(residual.clone())
    optimizer = torch.optim.Adam([parameter], lr=2e-3, weight_decay=5e-4)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with torch.no_grad():
        parameter.copy_(residual)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 200.0)
    content = {
        "state_dict": {"text_feature_residuals": parameter.detach(), "base_text_features": base},
        "epoch": 200,
        "optimizer": optimizer.state_dict(),
        "scheduler": {"successor": successor, "warmup_epoch": 1, "last_epoch": 200},
        "val_result": None,
        **more,
    }
    torch.save(content, path)
    return path


@pytest.fixture
def imported(model: Model, tmp_path: Path) -> tuple[Model, Path]:
    random_residual(model)
    rounded = model.classifier.base.half().float()  # as the published code rounds
    return model, _save(tmp_path / "model.pth.tar-200", rounded, model.classifier.residual.detach())


def test_imported_model_gives_the_same_logits(
    imported: tuple[Model, Path], base: str, spec: dict[str, Any], pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    model, path = imported
    found = import_checkpoint(path, base, spec["classes"], spec["template"])
    assert found.classifier.shift is None
    assert torch.equal(found.classifier.residual, model.classifier.residual)
    found.save_pretrained(tmp_path / "a")
    loaded = Model.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(loaded(pixel_values=pixel_values).logits, model(pixel_values=pixel_values).logits)


def test_an_enhanced_base_becomes_a_shift(model: Model, base: str, spec: dict[str, Any], tmp_path: Path) -> None:
    random_residual(model)
    enhanced = model.classifier.base + 0.3 * torch.randn_like(model.classifier.base)
    path = _save(tmp_path / "model.pth.tar-200", enhanced, model.classifier.residual.detach())
    found = import_checkpoint(path, base, spec["classes"], spec["template"], enhanced_base=True)
    found.save_pretrained(tmp_path / "a")
    loaded = Model.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(
        loaded.classifier.weight(), enhanced + 0.5 * model.classifier.residual, atol=1e-5, rtol=1e-5
    )


def test_the_published_base_can_be_kept(
    imported: tuple[Model, Path], base: str, spec: dict[str, Any], pixel_values: torch.Tensor, tmp_path: Path
) -> None:
    model, path = imported
    with torch.no_grad():
        image_embeds = model.get_image_features(pixel_values)
    rounded = model.classifier.base.half().float() + 0.5 * model.classifier.residual.detach()
    images = torch.nn.functional.normalize(image_embeds, dim=1)
    expected = model.classifier.logit_scale * images @ torch.nn.functional.normalize(rounded, dim=1).T
    gaps = {}
    for keep in (False, True):
        made = import_checkpoint(path, base, spec["classes"], spec["template"], keep_base=keep)
        made.save_pretrained(tmp_path / str(keep))
        with torch.no_grad():
            logits = Model.from_pretrained(tmp_path / str(keep))(image_embeds=image_embeds).logits
        gaps[keep] = float((logits - expected).abs().max())
    assert gaps[True] < 2e-5 < gaps[False] < 0.03
    bare = tmp_path / "bare.tar"
    torch.save({"state_dict": {"text_feature_residuals": model.classifier.residual.detach()}}, bare)
    with pytest.raises(ArtifactError, match="no base classifier"):
        import_checkpoint(bare, base, spec["classes"], spec["template"], keep_base=True)


@pytest.mark.parametrize("enhanced", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_two_swapped_classes_are_named(base: str, tmp_path: Path, enhanced: bool, noise: float) -> None:
    names = [
        "cat", "dog", "horse", "cow", "sheep", "pig", "goat", "rabbit", "lion", "tiger", "bear", "wolf", "fox", "deer",
        "apple", "banana", "cherry", "grape", "lemon", "melon", "car", "bus", "train", "ship",
    ]  # fmt: skip
    table = Model.from_base(base, names).classifier.base
    generator = torch.Generator().manual_seed(0)
    table = table + noise * table.std() * torch.randn(table.shape, generator=generator)
    rows = list(range(len(names)))
    rows[3], rows[17] = rows[17], rows[3]
    path = _save(tmp_path / "swapped.tar", table[rows], torch.zeros_like(table))
    with pytest.raises(BaseMismatchError, match=r"2 of 24 rows .*'cow' is nearest to 'grape'; .*'grape' .* 'cow'"):
        import_checkpoint(path, base, names, enhanced_base=enhanced)
    path = _save(tmp_path / "right.tar", table, torch.zeros_like(table))
    if noise and not enhanced:
        with pytest.raises(BaseMismatchError, match="--enhanced-base"):
            import_checkpoint(path, base, names)
    else:
        import_checkpoint(path, base, names, enhanced_base=enhanced)


def test_two_classes_of_one_name_are_no_swap(base: str, tmp_path: Path) -> None:
    names, prompts = ["cat", "missile", "missile (2)", "dog"], {"missile (2)": "missile"}
    table = Model.from_base(base, names, prompt_names=prompts).classifier.base
    noisy = table + 1e-3 * table.std() * torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    path = _save(tmp_path / "a.tar", noisy, torch.zeros_like(table))
    import_checkpoint(path, base, names, prompt_names=prompts)


def _repacked(source: Path, target: Path, change: Any = None, **options: Any) -> Path:
    """The archive again, each part through `change(name, content)`."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", **options) as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(name, content) if change else content)
    return target


def test_an_archive_that_unpacks_to_more_than_it_is(imported: tuple[Model, Path], tmp_path: Path) -> None:
    def grown(name: str, content: bytes) -> bytes:
        return bytes(20_000_000) if name.endswith("data/0") else content

    bomb = _repacked(imported[1], tmp_path / "bomb.tar", grown, compression=zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ArtifactError, match=r"unpacks to 20,\d{3},\d{3}"):
        read_checkpoint(bomb)


def test_two_parts_of_one_name(imported: tuple[Model, Path], tmp_path: Path) -> None:
    path = _repacked(imported[1], tmp_path / "twice.tar")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data/0", bytes(4 * 8 * 192))
    with pytest.raises(ArtifactError, match="two parts of one name"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"K\x08K\xc0\x86", b"J\x00\x00\x00\x40K\xc0\x86"),  # 2**30 rows
        (b"K\x08K\xc0\x86", b"K\x09K\xc0\x86"),  # one row more than there is
        (b"K\xc0K\x01\x86", b"K\x00K\x00\x86"),  # one number for every place
        (b"K\xc0K\x01\x86", b"M\x00\x04K\x01\x86"),  # rows far apart
        (b"K\x08K\xc0\x86", b"K\x00K\xc0\x86"),
        (b"K\x08K\xc0\x86", b"NK\xc0\x86"),
        (b"K\x08K\xc0\x86", b"(K\x08K\x08K\x03t"),
        (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00starage"),
        (b"FloatStorage", b"CharsStorage"),
        (b".", b"0."),
        (b".", b""),
    ],
)
def test_a_description_that_lies(imported: tuple[Model, Path], tmp_path: Path, old: bytes, new: bytes) -> None:
    def change(name: str, content: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return content
        assert old in content
        start, _, end = content.rpartition(old) if old == b"." else content.partition(old)
        return start + new + end

    path = _repacked(imported[1], tmp_path / "lie.tar", change)
    if b"starage" in new:  # a word that nobody reads
        assert len(read_checkpoint(path)[0]) == 8
        return
    with pytest.raises(ArtifactError, match=r"lie\.tar") as caught:
        read_checkpoint(path)
    assert "claims the shape" in str(caught.value) or new[:1] not in (b"J", b"M")


def test_any_flipped_byte_is_noticed(imported: tuple[Model, Path], tmp_path: Path) -> None:
    content = imported[1].read_bytes()
    expected = read_checkpoint(imported[1])
    unnoticed = 0
    for place in range(0, len(content), 307):
        (tmp_path / "a.tar").write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        try:
            residual, base = read_checkpoint(tmp_path / "a.tar")
        except ArtifactError:
            continue
        unnoticed += 1  # padding and dates
        assert torch.equal(residual, expected[0])
        assert base is not None
        assert expected[1] is not None
        assert torch.equal(base, expected[1])
    assert unnoticed < 15


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(8, 192, dtype=torch.int64),
        torch.zeros(8, 192, dtype=torch.complex64),
        torch.zeros(8, 192, dtype=torch.bool),
        torch.zeros(8, 192).to_sparse(),
        torch.zeros(192),
        torch.zeros(2, 8, 192),
        torch.zeros(0, 192),
        torch.zeros(1, 192).expand(8, 192),
        "text",
        [1.0],
        {"a": 1},
        torch.full((8, 192), float("inf")),
        torch.zeros(1536).as_strided((100, 100), (1, 1)),
    ],
    ids=str,
)
@pytest.mark.parametrize("key", ["text_feature_residuals", "base_text_features"])
def test_matrices_of_another_kind(tmp_path: Path, tensor: Any, key: str) -> None:
    state = {"text_feature_residuals": torch.zeros(8, 192), "base_text_features": torch.ones(8, 192), key: tensor}
    torch.save({"state_dict": state}, tmp_path / "a.tar")
    with pytest.raises(ArtifactError, match=key) as caught:
        read_checkpoint(tmp_path / "a.tar")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_and_strides(tmp_path: Path, dtype: torch.dtype) -> None:
    table = torch.randn(192, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = torch.stack([table, table + 1])
    torch.save(OrderedDict(text_feature_residuals=torch.nn.Parameter(whole[1].t())), tmp_path / "a.tar")
    residual, base = read_checkpoint(tmp_path / "a.tar")
    assert base is None
    assert torch.equal(residual, whole[1].t().float())


class _Attack:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.system, ("touch attacked",))


def test_code_in_a_checkpoint_is_refused(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = torch.zeros(8, 192)
    _save(tmp_path / "a.tar", table, table, extra=_Attack())
    (tmp_path / "b.tar").write_bytes(pickle.dumps(_Attack()))
    torch.save(
        {"state_dict": {"text_feature_residuals": table}, "more": _Attack()},
        tmp_path / "c.tar",
        _use_new_zipfile_serialization=False,
    )
    for name in ("a.tar", "b.tar", "c.tar"):
        with pytest.raises(ArtifactError, match="refused") as caught:
            read_checkpoint(tmp_path / name)
        assert "weights_only" not in str(caught.value)
    with pytest.raises(ArtifactError, match=f"names '{os.name}.system'"):
        read_checkpoint(tmp_path / "a.tar")
    assert not (tmp_path / "attacked").exists()


def test_what_is_no_taskres_checkpoint(imported: tuple[Model, Path], tmp_path: Path) -> None:
    torch.save({"state_dict": {"ctx": torch.zeros(16, 512)}}, tmp_path / "coop.tar")
    with pytest.raises(ArtifactError, match="no TaskRes checkpoint"):
        read_checkpoint(tmp_path / "coop.tar")
    with pytest.raises(ArtifactError, match="no file"):
        read_checkpoint(tmp_path / "missing.tar")
    with pytest.raises(ArtifactError, match="not a file"):
        read_checkpoint(tmp_path)
    (tmp_path / "cut.tar").write_bytes(imported[1].read_bytes()[:2000])
    with pytest.raises(ArtifactError, match="damaged"):
        read_checkpoint(tmp_path / "cut.tar")
    torch.save({"state_dict": {"text_feature_residuals": torch.full((8, 192), float("nan"))}}, tmp_path / "nan.tar")
    with pytest.raises(ArtifactError, match="NaN"):
        read_checkpoint(tmp_path / "nan.tar")


def test_wrong_classes_are_noticed(imported: tuple[Model, Path], base: str, spec: dict[str, Any]) -> None:
    _, path = imported
    with pytest.raises(ArtifactError, match="8 classes; 2 names"):
        import_checkpoint(path, base, ["cat", "dog"])
    with pytest.raises(BaseMismatchError, match="order"):
        import_checkpoint(path, base, list(reversed(spec["classes"])), spec["template"])


def test_command_line(
    imported: tuple[Model, Path], base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, path = imported
    out = tmp_path / "out"
    code, text, _ = run(
        capsys, "import", path, "--base-model", base, "--dataset", "animals-plants", "-o", out, "--json"
    )
    assert code == 0
    assert json.loads(text) == {
        "output_dir": str(out),
        "classes": 8,
        "alpha": 0.5,
        "enhanced_base": False,
        "base": "ours",
    }
    assert torch.equal(Model.from_pretrained(out).classifier.residual, model.classifier.residual)
    assert json.loads(run(capsys, "info", out, "--json")[1])["recipe"] == "imported"
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    again = ("import", path, "--base-model", base, "--dataset", "animals-plants", "-o", out, "--keep-base")
    code, _, error = run(capsys, *again)
    assert code == 1
    assert "--overwrite" in error
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    assert json.loads(run(capsys, *again, "--overwrite", "--json")[1])["base"] == "the checkpoint's"
    assert Model.from_pretrained(out).classifier.shift is not None
    code, _, error = run(capsys, "import", path, "--base-model", base, "-o", tmp_path / "other")
    assert code == 1
    assert "--class-names" in error
