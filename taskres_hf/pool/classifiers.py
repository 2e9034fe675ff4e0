"""`ClassifierPool`: many classifiers over one base, each picture embedded once, all logits in one product."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..artifact import CONFIG, WEIGHTS, find_artifact, prompts_of, read_artifact
from ..base_classifier import cached_table_path, write_table
from ..configuration_taskres import split_hub_kwargs
from ..embedding.embedder import Embedder
from ..encoders import BaseSource, base_name, encode_images
from ..errors import ArtifactError, ConfigurationError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..pictures import Remarks, read_image
from ..predicting import Pictures, WrittenPredictions
from ..tables import visible
from .answering import by_file, by_picture, to_file
from .bases import PoolBase
from .naming import named
from .packing import Pack, check_reads_text, is_pack, pack, unpack
from .stacked import PooledClassifier, PoolView, Stack, folded

Source = str | os.PathLike[str] | TaskResCLIPForImageClassification
Sources = Mapping[str, Source] | Sequence[Source] | Source | Pack


class ClassifierPool:
    """Many classifiers over one base; about 4 K D bytes each.

        pool = ClassifierPool.from_folders("classifiers/")
        pool.classify(["cat.jpg"], ["pets", "food"])

    What is asked of a pool is answered from the classifiers as they were when it began: `add` and `remove` in other
    threads change what comes after. Who asks several things that belong together holds a `view()`.

    Args:
        base: Hub id, folder or loaded dual encoder, or a classifier whose base is to be shared; by default that of the
            first classifier that is added.
        classifiers: as in `update`.
        revision: commit of the base. dtype: what it runs in; fp32, or as the first classifier says.
        device: where base and rows lie.
        image_processor: of the base; read beside it by default.
        engine, precision, exact_preprocessing: how `embed` runs the tower, see `embedding.engines`; the defaults give
            what each classifier's own model gives.
        strength: of all that are loaded, from 0 (zero-shot) to 1 (as trained); by default what each was saved with.
        trust_remote_code: let the base run code from its repository.
        **options: `token`, `cache_dir`, `local_files_only`; and `attn_implementation` of the base.

    Raises:
        ArtifactError, BaseModelError, HubError: what was given cannot be loaded. ConfigurationError: see `update`.
    """

    def __init__(
        self,
        base: str | os.PathLike[str] | PreTrainedModel | None = None,
        classifiers: Sources | None = None,
        *,
        revision: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        image_processor: Any = None,
        engine: str = "torch",
        precision: str = "fp32",
        exact_preprocessing: bool = True,
        strength: float | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> None:
        self._hub, self._options = split_hub_kwargs(options)
        self._revision, self._dtype, self._device = revision, dtype, device
        self._trusted, self._embedding = trust_remote_code, (engine, precision, exact_preprocessing)
        self._strength = strength
        self._writing, self._running = threading.RLock(), threading.Lock()
        self._base: PoolBase | None = None
        self._embedder: Embedder | None = None
        self._stack: Stack | None = None
        if isinstance(base, TaskResCLIPForImageClassification):
            check_reads_text(base.config.base_classifier, "given as base")
            self._settle(PoolBase.of_model(base))
        elif base is not None:
            source = BaseSource(base_name(base), revision, self._hub, trust_remote_code)
            self._settle(PoolBase.load(base, dtype or torch.float32, source, image_processor, **self._options))
        if classifiers is not None:
            self.update(classifiers)

    @classmethod
    def from_folders(cls, root: str | os.PathLike[str], **options: Any) -> ClassifierPool:
        """All classifiers whose folders lie in a folder, named after them.

        Args:
            **options: as in the constructor, such as `base`.

        Raises:
            ArtifactError: there is no such folder, none in it, or one of them is damaged.
        """
        if not os.path.isdir(root):
            raise ArtifactError(f"There is no folder {visible(os.fspath(root))}.")
        folders = [entry for entry in sorted(Path(root).iterdir()) if (entry / CONFIG).is_file()]
        found = [folder for folder in folders if (folder / WEIGHTS).is_file()]
        if not found:
            raise ArtifactError(f"No folder in {visible(os.fspath(root))} is a classifier: none holds {WEIGHTS}.")
        return cls(classifiers=found, **options)

    @classmethod
    def from_pretrained(cls, sources: Sources, **options: Any) -> ClassifierPool:
        """Classifiers from folders, from the Hub or from a packed file; see `update` and the constructor."""
        return cls(classifiers=sources, **options)

    # ---------------------------------------------------------------------- what is in it

    def view(self) -> PoolView:
        """The classifiers as they are now: nothing changes in it, and its `logits` and the like are of one moment."""
        return self._stack.view if self._stack else PoolView(torch.empty(0, 0), torch.empty(0), {})

    @property
    def names(self) -> list[str]:
        """Of the classifiers, in the order in which they came."""
        return self.view().names

    def __len__(self) -> int:
        return len(self.view())

    def __contains__(self, name: object) -> bool:
        return name in self.view()

    def __iter__(self) -> Iterator[str]:
        return iter(self.view())

    def __getitem__(self, name: str) -> PooledClassifier:
        """What is known of a classifier: `class_names`, `several_labels`, `threshold`, `checksum`."""
        return self.view()[name]

    def __repr__(self) -> str:
        view, base = self.view(), self._base
        rows = sum(len(one.class_names) for one in view.values())
        return f"ClassifierPool({len(view)} classifiers, {rows} classes, base {base.name if base else None!r})"

    @property
    def clip(self) -> PreTrainedModel:
        """The base."""
        return self._known().model

    @property
    def image_processor(self) -> Any:
        """The image processor pictures must go through."""
        return self._known().image_processor

    @property
    def embedder(self) -> Embedder:
        """What takes pictures through the base; one thread at a time may."""
        self._known()
        assert self._embedder is not None
        return self._embedder

    def add(self, name: str, source: Source) -> None:
        """Put in a classifier, or another in the place of the one of that name; see `update`."""
        self.update({name: source})

    def update(self, sources: Sources) -> None:
        """Put in classifiers, all in one step; those of a name that is there take its place.

        Args:
            sources: folders, Hub ids or loaded models: by name, or a list of them, named after their folder or
                repository (or as in `"pets=folder"`); or one packed file (`Pack`). Of a model its head is taken as
                it is now.

        Raises:
            ArtifactError, HubError: one cannot be read. BaseMismatchError: one was made for another base.
            ConfigurationError: a name that is none, two of one name, another image processor, or a classifier of
                several labels per picture that was never trained, or over an image tower alone. Nothing is changed
                then.
        """
        packed = sources if isinstance(sources, Pack) else Pack(sources) if is_pack(sources) else None  # type: ignore
        found: Mapping[str, Any] = {name: (packed, name) for name in packed} if packed else named(sources)
        with self._writing:
            before = self._base, self._embedder
            try:
                folds = {name: folded(self._weakened(self._head(source), source)) for name, source in found.items()}
            except BaseException:
                self._base, self._embedder = before  # not that of a classifier that did not get in
                raise
            finally:
                if self._base is not None:
                    self._base.forget_text_side()
            if folds:
                self._stack = self._stack or Stack(next(iter(folds.values()))[0].shape[1], self.clip.device)
                self._stack.change(folds)

    def remove(self, *names: str) -> None:
        """Take classifiers out.

        Raises:
            ConfigurationError: there is none of a name; nothing is changed then.
        """
        with self._writing:
            for name in names:
                self.view().find(name)
            if self._stack:
                self._stack.change({}, names)

    def _known(self) -> PoolBase:
        if self._base is None:
            raise ConfigurationError("The pool has no base yet: give base=, or add a classifier.")
        return self._base

    def _settle(self, base: PoolBase) -> PoolBase:
        if self._device is not None:
            base.model.to(self._device)  # type: ignore[arg-type]
        self._embedder = Embedder(base.model, base.image_processor, *self._embedding)
        self._base = base
        return base

    def _weakened(self, head: Any, source: Any) -> Any:
        """A head that was loaded for the pool, at the pool's strength; that of somebody's model as it is."""
        if self._strength is not None and not isinstance(source, TaskResCLIPForImageClassification):
            head.strength = self._strength
        return head

    def _head(self, source: Any) -> Any:
        """The head of a classifier, checked against the base, which the first of all brings."""
        if isinstance(source, TaskResCLIPForImageClassification):
            where = visible(str(source.config._name_or_path or "given"))
            check_reads_text(source.config.base_classifier, where)
            return (self._base or self._settle(PoolBase.of_model(source))).head_of(source, where)
        if isinstance(source, tuple):
            return self._packed_head(*source)
        read = read_artifact(*find_artifact(source, **self._hub))
        check_reads_text(read[0].get("base_classifier"), visible(os.fspath(source)))
        if self._base is None:
            model = TaskResCLIPForImageClassification.from_pretrained(
                source, base_revision=self._revision, dtype=self._dtype, base_trust_remote_code=self._trusted,
                **self._hub, **self._options,
            )  # fmt: skip
            self._settle(PoolBase.of_model(model))
            return model.classifier
        return self._base.head(*read, visible(os.fspath(source)))

    def _packed_head(self, pack: Pack, name: str) -> Any:
        config, stored, processor = pack.read(name)
        check_reads_text(config.get("base_classifier"), f"{name} of {visible(str(pack.path))}")
        if self._base is None:
            where = BaseSource(
                str(config["base_model_name_or_path"]), self._revision or config.get("base_model_revision"),
                {**self._hub, **({"subfolder": sub} if (sub := config.get("base_model_subfolder")) else {})},
                self._trusted, True,
            )  # fmt: skip
            dtype = self._dtype or config.get("dtype") or torch.float32
            self._settle(PoolBase.load(where.name, dtype, where, **self._options))
        table = pack.table(name)
        tensors = {key: as_tensor(tensor) for key, tensor in stored.items()}
        return self._known().head(
            config, tensors, processor, f"{name} of {visible(str(pack.path))}",
            None if table is None else as_tensor(table),
        )  # fmt: skip

    # ---------------------------------------------------------------------- classifying

    def __call__(
        self,
        pixel_values: Tensor | None = None,
        image_embeds: Tensor | None = None,
        names: Sequence[str] | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """Every picture by every classifier: logits [N, K] by name, those that its own model gives.

        Args:
            pixel_values: [N, 3, H, W] from the image processor. image_embeds: [N, D] instead, from `embed`.
            names: some of the classifiers; all by default.
            **inputs: what else the base's image tower takes.

        Raises:
            ConfigurationError: both or neither of pixel values and embeddings, embeddings of another size or not
                finite, or no such classifier.
        """
        if (pixel_values is None) == (image_embeds is None):
            raise ConfigurationError("Pass either pixel_values or image_embeds; got both or neither.")
        view = self.view()
        if image_embeds is None:
            with torch.no_grad():
                image_embeds = encode_images(self.clip, {"pixel_values": pixel_values, **inputs})
        return view.logits(image_embeds, names)

    def logits(self, image_embeds: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Every picture by every classifier, see `PoolView.logits`."""
        return self.view().logits(image_embeds, names)

    def logits_of_each(self, image_embeds: Tensor, names: Sequence[str]) -> list[Tensor]:
        """Every picture by its own classifier, see `PoolView.logits_of_each`."""
        return self.view().logits_of_each(image_embeds, names)

    def rejects(self, image_embeds: Tensor, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Whether pictures are of no class, see `PoolView.rejects`."""
        return self.view().rejects(image_embeds, names)

    def embed(self, pictures: Sequence[Any] | Any) -> Tensor:
        """Embeddings [N, D] fp32 on the CPU of pictures: PIL images, or files, addresses and arrays (`read_image`).

        Raises:
            ImageError: one cannot be read.
        """
        embedder = self.embedder
        alone = isinstance(pictures, (str, os.PathLike)) or not isinstance(pictures, Sequence)
        remarks = Remarks()
        read = [read_image(one, remarks=remarks) for one in ([pictures] if alone else pictures)]
        remarks.warn(stacklevel=2)
        if not read:
            raise ConfigurationError("There are no pictures.")
        with self._running:
            size = embedder.batch_size
            return torch.cat([embedder(read[start : start + size]) for start in range(0, len(read), size)])

    def classify(
        self,
        pictures: Sequence[Any] | Any,
        names: Sequence[str] | None = None,
        *,
        each: Sequence[str] | None = None,
        top_k: int | None = None,
    ) -> list[Any]:
        """Labels and scores of pictures, as `pipeline` gives them.

        Args:
            pictures: as in `embed`. names: classifiers that every picture goes through; all by default.
            each: instead, the one classifier of each picture.
            top_k: classes; by default one or, of several labels per picture, each from its threshold on.

        Returns:
            For each picture `{name: [{"label", "score"}]}`; with `each`, `[{"label", "score"}]`.

        Raises:
            ImageError: a picture cannot be read. ConfigurationError: both `names` and `each`, or no such classifier.
        """
        if names is not None and each is not None:
            raise ConfigurationError("Give either names (for all pictures) or each (one for every picture).")
        view = self.view()
        for name in (each or names or ()) if not isinstance(each or names, str) else ():
            view.find(name)  # before pictures are embedded
        embeds = self.embed(pictures)
        if each is not None:
            logits = view.logits_of_each(embeds, each)
            return [view.predictions(name, row[None], top_k)[0] for name, row in zip(each, logits, strict=True)]
        return by_picture(view, embeds, names, top_k)

    def classify_files(
        self,
        files: Sequence[str | os.PathLike[str]],
        names: Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        batch_size: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Files and addresses by several classifiers, in order; what cannot be read is reported, not raised.

        All answers are from the classifiers as they were when the first row was asked for.

        Args:
            files: what `read_image` takes as text. names, top_k: as in `classify`.
            batch_size: pictures a forward pass, by default the engine's best.

        Yields:
            `{"file", "classifiers": {name: [{"label", "score"}]}, "error"}`.
        """
        view, items = self.view(), Pictures(self.embedder, files)
        view.chosen(names)  # no such classifier: before pictures are read
        with self._running:
            yield from by_file(view, items, names, top_k, batch_size or self.embedder.batch_size)

    def classify_to_file(
        self,
        files: Sequence[str | os.PathLike[str]],
        output: str | os.PathLike[str],
        names: Sequence[str] | None = None,
        *,
        top_k: int | None = None,
        batch_size: int | None = None,
        resume: bool = False,
        progress: bool = False,
    ) -> WrittenPredictions:
        """Write the answers to one .csv, .jsonl or .parquet file: a row for each picture and classifier.

        As `predicting.classify_to_file`, with `classifier` as the second column. Where one of the classifiers gives
        several labels per picture and `top_k` is not given, the columns are those of several labels.

        Args:
            files, names, top_k, batch_size: as in `classify_files`. output, resume, progress: as there.

        Returns:
            The account, which counts pictures.

        Raises:
            ConfigurationError, ArtifactError: as there, or there is no such classifier.
        """
        view, items = self.view(), Pictures(self.embedder, files)
        with self._running:
            return to_file(view, items, Path(output), names, top_k, batch_size, resume=resume, progress=progress)


def as_tensor(stored: Any) -> Tensor:
    """A stored tensor in fp32."""
    values = stored.values()
    return torch.frombuffer(values, dtype=torch.float32).reshape(stored.shape).clone()


def pack_with_base(sources: Any, output: str | os.PathLike[str], base: Any = None, **options: Any) -> Pack:
    """`pack` with the rows of the base classifiers, for which the base is loaded: loading needs no text tower then.

    Args:
        base, **options: as in `ClassifierPool`.

    Raises:
        ArtifactError, BaseModelError, ConfigurationError, HubError: as in `pack` and `ClassifierPool.update`.
    """
    pool = ClassifierPool(base, **options)
    try:
        return pack(sources, output, tables=lambda source, _: pool._head(source).base.cpu(), **pool._hub)
    finally:
        if pool._base is not None:
            pool._base.forget_text_side()


def keep_tables(packed: Pack, names: Sequence[str]) -> None:
    """Keep the base classifiers of a pack where `from_pretrained` looks for them, so that it loads no text tower."""
    for name in names:
        config, table = packed.read(name).config, packed.table(name)
        where = BaseSource(str(config["base_model_name_or_path"]), config.get("base_model_revision"))
        path = cached_table_path(where, prompts_of(config), config.get("prompt_average") or "raw")
        if table is not None and path is not None and not path.exists():
            write_table(path, as_tensor(table))


def load_packed(packed: Pack, name: str, **options: Any) -> TaskResCLIPForImageClassification:
    """One classifier of a pack as a model of its own.

    Args:
        **options: as in `from_pretrained`.

    Raises:
        ArtifactError, BaseModelError, ConfigurationError, HubError: as there; there is none of that name.
    """
    with tempfile.TemporaryDirectory() as scratch:
        (folder,) = unpack(packed, scratch, [name])
        keep_tables(packed, [name])
        model = TaskResCLIPForImageClassification.from_pretrained(folder, **options)
    model.config._name_or_path = name
    return model  # type: ignore[no-any-return]
