"""Many classifiers over one base in one file.

A pack is a safetensors file under one checksum, see `storage`:

    texts     U8, compressed: each distinct file of the artifacts that is text, and the head of each weights file
    weights   U8: the numbers of each weights file, byte for byte
    base      F32 [R, D]: rows of the base classifiers `t`, so that loading needs no text tower; there or not
    metadata  `index`: which of those belong to which classifier; `pack_version`

So `unpack` gives back the very files, and what the artifacts have in common, such as the image processor, is there
once. Reading imports no torch.
"""

from __future__ import annotations

import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..artifact import Checked, check_loads, find_artifact, read_checked
from ..errors import ArtifactError, ConfigurationError
from ..schema import (
    CLASS_BIAS,
    CONFIG,
    PROCESSOR,
    WEIGHTS,
    problem_of_config,
    problem_of_processor,
    problem_of_shapes,
    problem_of_tensors,
    problem_of_version,
    tensors_digest,
)
from ..storage import (
    SEAL,
    StoredTensor,
    check_can_write,
    json_digest,
    parse_json,
    parse_tensors,
    read_stored,
    staging_folder,
    umask,
    write_bytes,
    write_tensors,
)
from ..tables import visible
from .naming import checked_name, named

if TYPE_CHECKING:
    from torch import Tensor

PACK_VERSION = 1
CONTENTS = "taskres pack"
# The files of an artifact: no others are packed, and nothing else is ever written by `unpack`.
FILES = (CONFIG, WEIGHTS, PROCESSOR, "processor_config.json", "README.md", "run.yaml", "modeling_taskres.py")
_TEXTS, _WEIGHTS, _BASE = "texts", "weights", "base"
_MOST_TEXT = 2**20  # bytes a classifier on average, and at least 64 of those in all: what is beyond is no text of ours
_SAME_BASE = ("base_model_name_or_path", "base_model_revision", "base_model_subfolder", "projection_dim")


def is_pack(path: Any) -> bool:
    """Whether that is the name of a file that may be a pack."""
    return isinstance(path, (str, os.PathLike)) and os.fspath(path).endswith(".safetensors") and os.path.isfile(path)


def folders_in(sources: Sequence[str]) -> list[str]:
    """What was named; a folder that is no classifier and holds some stands for those."""
    found: list[str] = []
    for source in sources:
        inside = sorted(str(file.parent) for file in Path(source).glob(f"*/{CONFIG}"))
        inside = [folder for folder in inside if os.path.isfile(os.path.join(folder, WEIGHTS))]
        found += inside if inside and not os.path.isfile(os.path.join(source, CONFIG)) else [source]
    return found


def classifiers_at(path: str, names: Sequence[str] = ()) -> Pack | dict[str, str] | None:
    """The classifiers that a packed file holds, or folders by name where it is a folder of such; None where neither.

    Raises:
        ConfigurationError: there is none of one of the names. ArtifactError: the packed file is damaged.
    """
    folders = [] if is_pack(path) else folders_in([path])
    if folders == [path]:
        return None
    found = named(folders) if folders else Pack(path)
    for name in names:
        if name not in found:
            known = ", ".join(list(found)[:20]) + (", ..." if len(found) > 20 else "")
            raise ConfigurationError(f"There is no classifier {visible(name[:100])!r} in {visible(path)}: {known}.")
    return found


class Pack:
    """A packed file, read and verified.

    Args:
        path: the file.

    Attributes:
        has_base: whether the rows of the base classifiers are in it.

    Raises:
        ArtifactError: it is missing, damaged, no pack, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        tensors, metadata = read_stored(self.path)
        if metadata.get("contents") != CONTENTS:
            advice = "taskres pack FOLDERS -o pool.safetensors makes one."
            if self.path.name == WEIGHTS:
                advice = f"It holds the weights of one classifier: name its folder, {visible(str(self.path.parent))}."
            raise ArtifactError(f"{self._shown} is no packed file. {advice}")
        if SEAL not in metadata:
            raise ArtifactError(f"{self._shown} has lost its checksum: the file was altered or damaged. Pack again.")
        if metadata.get("pack_version") != str(PACK_VERSION):
            raise ArtifactError(
                f"{self._shown} is a pack of version {metadata.get('pack_version')!r:.20}; this library reads "
                f"{PACK_VERSION}. It was made by a newer taskres_hf: upgrade with `pip install -U taskres_hf`."
            )
        index = parse_json(metadata.get("index", ""), self._shown, unique=True)
        self._refuse(_problem_of_index(index, tensors))
        self._classifiers: dict[str, dict[str, Any]] = index["classifiers"]
        self._texts = self._unpacked(tensors[_TEXTS].content, index["texts"])
        self._data, self._base = memoryview(tensors[_WEIGHTS].content), tensors.get(_BASE)

    @property
    def _shown(self) -> str:
        return visible(str(self.path))

    @property
    def has_base(self) -> bool:
        return self._base is not None

    @property
    def names(self) -> list[str]:
        """Of the classifiers, in the order in which they were packed."""
        return list(self._classifiers)

    def __len__(self) -> int:
        return len(self._classifiers)

    def __contains__(self, name: object) -> bool:
        return name in self._classifiers

    def __iter__(self) -> Iterator[str]:
        return iter(self._classifiers)

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._classifiers:
            known = ", ".join(self.names[:20]) + (", ..." if len(self) > 20 else "")
            raise ConfigurationError(f"There is no classifier {visible(name[:100])!r} in {self._shown}: {known}.")
        return self._classifiers[name]

    def files(self, name: str) -> dict[str, bytes]:
        """The files of an artifact by name, as they were.

        Raises:
            ConfigurationError: there is no classifier of that name.
        """
        entry = self._entry(name)
        start, length = entry["data"]
        found = {file: self._texts[place] for file, place in entry["files"].items()}
        found[WEIGHTS] += bytes(self._data[start : start + length])
        return found

    def read(self, name: str) -> Checked:
        """Config, tensors and image processor of a classifier, checked as those of a folder are.

        Raises:
            ArtifactError: they are not an artifact's. ConfigurationError: there is none of that name.
        """
        files, where = self.files(name), f"{self._shown} ({name})"
        config = _json(files[CONFIG], where)
        processor = _json(files[PROCESSOR], where) if PROCESSOR in files else None
        tensors, _ = parse_tensors(files[WEIGHTS], where)
        self._refuse(problem_of_version(config) or problem_of_tensors(tensors), where)
        if config.get("residual_sha256") != tensors_digest(tensors):
            raise ArtifactError(f"{where}: the checksum of its tensors is not the one in its config. Pack again.")
        self._refuse(problem_of_config(config, CLASS_BIAS in tensors), where)
        self._refuse(problem_of_shapes(config, tensors) or problem_of_processor(processor or {}), where)
        return Checked(config, tensors, processor)

    def table(self, name: str) -> StoredTensor | None:
        """Rows `t` [K, D] of a classifier's base; None where the pack has none."""
        rows = self._entry(name)["base"]
        if rows is None or self._base is None:
            return None
        start, stop = rows
        dim = self._base.shape[1]
        content = memoryview(self._base.content)[4 * dim * start : 4 * dim * stop]
        return StoredTensor("F32", (stop - start, dim), bytes(content))

    def _refuse(self, problem: str | None, where: str = "") -> None:
        if problem:
            raise ArtifactError(f"{where or self._shown}: {problem}")

    def _unpacked(self, content: bytes, lengths: Sequence[int]) -> list[bytes]:
        """The texts, no more of them than the index speaks of."""
        total, places = sum(lengths), zlib.decompressobj()
        try:
            text = places.decompress(content, total + 1)
        except zlib.error as error:
            raise ArtifactError(f"{self._shown} is damaged: its texts cannot be read ({error}). Pack again.") from error
        self._refuse(None if len(text) == total else "it is damaged: its texts are not as long as it says. Pack again.")
        found, start = [], 0
        for length in lengths:
            found.append(text[start : start + length])
            start += length
        return found


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        return parse_json(content.decode("utf-8"), where, unique=True)
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{where} cannot be read as JSON ({error}). Pack it again.") from error


def _problem_of_index(index: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str | None:
    """Why an index does not describe these tensors."""
    damaged = "it is damaged: its index does not describe what is in it. Pack again."
    if not {_TEXTS, _WEIGHTS} <= set(tensors) <= {_TEXTS, _WEIGHTS, _BASE}:
        return damaged
    base = tensors.get(_BASE)
    plain = all(tensors[name].dtype == "U8" and len(tensors[name].shape) == 1 for name in (_TEXTS, _WEIGHTS))
    if not plain or (base is not None and (base.dtype != "F32" or len(base.shape) != 2)):
        return damaged
    texts, classifiers = index.get("texts"), index.get("classifiers")
    if not isinstance(texts, list) or not all(map(_count, texts)) or not isinstance(classifiers, dict):
        return damaged
    if sum(texts) > _MOST_TEXT * max(64, len(classifiers)):
        return "it holds more text than so many classifiers have."
    size, rows = tensors[_WEIGHTS].shape[0], base.shape[0] if base is not None else 0
    for name, entry in classifiers.items():
        try:
            checked_name(name)
        except ConfigurationError as error:
            return str(error)
        fine = (
            isinstance(entry, dict)
            and set(entry) == {"files", "data", "base"}
            and isinstance(entry["files"], dict)
            and {CONFIG, WEIGHTS} <= set(entry["files"]) <= set(FILES)
            and all(_count(place) and place < len(texts) for place in entry["files"].values())
            and _span(entry["data"]) and sum(entry["data"]) <= size
            and (entry["base"] is None or (_span(entry["base"]) and entry["base"][0] < entry["base"][1] <= rows))
        )  # fmt: skip
        if not fine:
            return damaged
    return None


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _span(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_count, value))


# ---------------------------------------------------------------------- packing


def pack(
    sources: Mapping[str, str | os.PathLike[str]] | Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    tables: Callable[[str, Checked], Tensor] | None = None,
    **hub: Any,
) -> Pack:
    """Write artifacts over one base into one file, whole or not at all; what is left out of a folder is a warning.

    Args:
        sources: folders or Hub ids, by name or named after their folder or repository.
        output: the file, whose name ends in `.safetensors`; it is replaced in one step.
        tables: gives `t` [K, D] of a source, to be packed with it; without it none is, and whoever loads the pack on a
            machine that does not know them embeds the prompts again.
        **hub: `revision`, `token`, `cache_dir`, `local_files_only`.

    Raises:
        ArtifactError: one of them is damaged, or the file cannot be written. ConfigurationError: none is given, two
            have one name, they have different bases or image processors, or one is over an image tower alone; or the
            file is the weights of a classifier.
    """
    from torch import cat, frombuffer, uint8

    output, found = Path(output), named(sources)
    if output.suffix != ".safetensors":
        raise ConfigurationError(f"A packed file's name must end in .safetensors; got {visible(str(output))!r}.")
    if output.name == WEIGHTS and (output.parent / CONFIG).is_file():
        raise ConfigurationError(
            f"{visible(str(output))} holds the weights of a model, which would be lost. Choose another name."
        )
    check_can_write(output.absolute().parent)
    if not found:
        raise ConfigurationError("There is nothing to pack: give folders or Hub ids of classifiers.")
    texts, places = bytearray(), _Places()
    weights, classifiers = bytearray(), {}
    rows: list[tuple[Tensor, int]] = []
    first: tuple[str, Checked] | None = None
    for name, source in found.items():
        checked, files = _artifact(source, hub)
        first = first or (name, checked)
        check_together(*first, name, checked)
        content = files.pop(WEIGHTS)
        head = 8 + int.from_bytes(content[:8], "little")
        kept = {WEIGHTS: content[:head], **files}
        entry: dict[str, Any] = {"files": {file: places.of(text, texts) for file, text in kept.items()}}
        entry["data"], entry["base"] = [len(weights), len(content) - head], None
        weights += content[head:]
        if tables is not None:
            table = tables(str(source), checked)
            start = rows[-1][1] if rows else 0
            rows.append((table, start + len(table)))
            entry["base"] = [start, start + len(table)]
        classifiers[name] = entry
    index = json.dumps({"texts": places.lengths, "classifiers": classifiers}, separators=(",", ":"))
    tensors = {
        _TEXTS: frombuffer(bytearray(zlib.compress(bytes(texts), 6)), dtype=uint8),
        _WEIGHTS: frombuffer(weights, dtype=uint8),
    }
    if rows:
        tensors[_BASE] = cat([table.float() for table, _ in rows])
    metadata = {"contents": CONTENTS, "pack_version": str(PACK_VERSION), "index": index}
    write_tensors(output, tensors, metadata)
    return Pack(output)


class _Places:
    """Where each distinct text lies."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}
        self.lengths: list[int] = []

    def of(self, text: bytes, texts: bytearray) -> int:
        if text not in self._known:
            self._known[text] = len(self.lengths)
            self.lengths.append(len(text))
            texts += text
        return self._known[text]


def _artifact(source: str | os.PathLike[str], hub: Mapping[str, Any]) -> tuple[Checked, dict[str, bytes]]:
    """An artifact, read and verified, and its files."""
    config, weights = find_artifact(source, **hub)
    folder = Path(config).parent
    checked = read_checked(config, weights)
    check_reads_text(checked.config.get("base_classifier"), visible(str(source)))
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if _json(files[CONFIG], config) != checked.config or parse_tensors(files[WEIGHTS], weights)[0] != checked.tensors:
        raise ArtifactError(f"{visible(str(folder))} changes while it is read, or a save into it was cut short.")
    left = sorted(entry.name for entry in folder.iterdir() if entry.name not in FILES and entry.name[0] != ".")
    if left and os.path.isdir(source):
        shown = ", ".join(map(visible, left[:5])) + (", ..." if len(left) > 5 else "")
        warnings.warn(f"Not packed, as it is no part of the classifier {visible(str(folder))}: {shown}", stacklevel=3)
    return checked, files


def check_reads_text(base_classifier: str | None, where: str) -> None:
    """Refuse a classifier over one tower alone, by `config.base_classifier`: neither pool nor pack is for those.

    Raises:
        ConfigurationError: it is one.
    """
    if base_classifier is not None:
        raise ConfigurationError(
            f"The classifier {where} is over an image tower alone or of texts, and pools and packed files are for "
            "classifiers over a dual encoder. Use it by itself, with from_pretrained."
        )


def check_together(first: str, ours: Checked, name: str, theirs: Checked) -> None:
    """Refuse two artifacts that cannot be in one pack.

    Raises:
        ConfigurationError: they have different bases or image processors.
    """
    for key in _SAME_BASE:
        if ours.config.get(key) != theirs.config.get(key):
            raise ConfigurationError(
                f"{first!r} and {name!r} have different bases ({key} {visible(str(ours.config.get(key)))!r} and "
                f"{visible(str(theirs.config.get(key)))!r}), and a pack has one. Pack those of one base each."
            )
    from ..base_classifier import check_same_bases

    if json_digest(ours.processor) != json_digest(theirs.processor):
        raise ConfigurationError(
            f"{first!r} and {name!r} prepare pictures differently (preprocessor_config.json), and a pack has one way. "
            "Pack them apart."
        )
    plain = {**dict.fromkeys(_SAME_BASE), "text_encoding": None}
    sides = (SimpleNamespace(**plain, base_fingerprint=one.config["base_fingerprint"]) for one in (ours, theirs))
    check_same_bases(*sides)


# ---------------------------------------------------------------------- unpacking


def unpack(
    path: str | os.PathLike[str] | Pack, folder: str | os.PathLike[str], names: Sequence[str] | None = None
) -> list[Path]:
    """Write classifiers of a pack as the folders they were, each whole or not at all.

    Args:
        path: the file. folder: where their folders come; made when missing. names: some of them; all by default.

    Returns:
        Their folders.

    Raises:
        ArtifactError: the pack is damaged, one of the folders is there already, or none can be written.
        ConfigurationError: there is no classifier of a name.
    """
    packed = path if isinstance(path, Pack) else Pack(path)
    chosen, root = packed.names if names is None else list(names), Path(folder)
    for name in chosen:
        packed.files(name)
    there = [name for name in chosen if os.path.lexists(root / name)]
    if there or len({name.casefold() for name in chosen}) < len(chosen):
        what = f"{visible(str(root / there[0]))} is there already" if there else "two names differ in their case alone"
        raise ArtifactError(f"Cannot unpack: {what}. Nothing was changed; choose another folder, or some by name.")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with staging_folder(root, "unpack") as staging:
            for name in chosen:
                packed.read(name)
                for file, content in packed.files(name).items():
                    write_bytes(staging / name / file, content)
                check_loads(staging / name)
                os.chmod(staging / name, 0o777 & ~umask())
            for name in chosen:
                os.rename(staging / name, root / name)
    except OSError as error:
        raise ArtifactError(f"Cannot unpack into {visible(str(root))}: {error.strerror or error}.") from error
    return [root / name for name in chosen]


def described(packed: Pack) -> list[dict[str, Any]]:
    """A row for each classifier: name, number of classes, base, recipe, shots, bytes of its files."""
    rows = []
    for name in packed:
        config, files = packed.read(name).config, packed.files(name)
        training, draw = config.get("training") or {}, config.get("few_shot") or {}
        rows.append({
            "name": name, "classes": len(config["id2label"]), "base_model": config["base_model_name_or_path"],
            "base_revision": config.get("base_model_revision"),
            "recipe": training.get("recipe") or training.get("method"), "shots": draw.get("shots"),
            "several_labels": config.get("problem_type") == "multi_label_classification",
            "bytes": sum(map(len, files.values())),
        })  # fmt: skip
    return rows
