"""From any dataset to embeddings for a model's classes, with the engine that the settings ask for."""

from __future__ import annotations

from typing import Any

from ..data.labelled import LabelledImages
from ..embedding.embedder import Embedder
from ..embedding.features import ImageFeatures, embed_images
from ..embedding.stored import StoredFeatures
from ..errors import DataError
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..storage import cache_root
from .arguments import TaskResTrainingArguments
from .known_pictures import Name, picture_names


class DatasetEmbeddings:
    """Embeddings of datasets, each made once.

    Args:
        model: whose base, image processor and classes are used. args: how. accelerator: shares pictures out.
    """

    def __init__(self, model: TaskResCLIPForImageClassification, args: TaskResTrainingArguments, accelerator: Any):
        self.model, self.args, self.accelerator = model, args, accelerator
        self._embedder: Embedder | None = None
        self._made: dict[tuple[int, int], tuple[Any, Any, ImageFeatures]] = {}

    @property
    def embedder(self) -> Embedder:
        """Base, processor and engine; made when first needed."""
        if self._embedder is None:
            args, engine, precision = self.args, self.args.engine, self.args.precision
            if args.recipe == "paper":  # as published unless asked otherwise
                engine = "torch" if engine == "auto" else engine
                precision = "fp32" if precision == "auto" else precision
            crop: dict[str, Any] = {"crop": args.crop} if args.crop != "processor" else {}
            self._embedder = Embedder(
                self.model.clip, self.model.image_processor, engine, precision, args.exact_preprocessing,
                args.draft_decoding, **crop,
            )  # fmt: skip
        return self._embedder

    def source(self, dataset: Any) -> LabelledImages | ImageFeatures | StoredFeatures:
        """A dataset with labels in the order of the model's classes.

        Raises:
            DataError: embeddings of another length or other classes; or as `LabelledImages`.
        """
        names, dim = self.model.class_names, self.model.classifier.base.shape[1]
        if isinstance(dataset, (ImageFeatures, StoredFeatures)):
            length = dataset.shape[2] if isinstance(dataset, StoredFeatures) else dataset.image_embeds.shape[2]
            if dataset.class_names != names or length != dim:
                raise DataError(
                    f"The embeddings have {len(dataset.class_names)} classes and length {length}; the model has "
                    f"{len(names)} and {dim}, or names or order differ."
                )
            return dataset
        if not isinstance(dataset, LabelledImages):
            dataset = LabelledImages(
                dataset,
                image_column=self.args.image_column,
                label_column=self.args.label_column,
                default_names=names,
                drop_unlabelled=self.args.drop_unlabelled,
            )
        aligned: LabelledImages = dataset.aligned(names, self.args.label_map)
        return aligned

    def of(self, dataset: Any, views: int = 0) -> ImageFeatures:
        """Embeddings of a dataset, made once as long as this object lives; see `TaskResTrainer.embed`."""
        made = self._made.get((id(dataset), views))
        if made is None:  # the dataset is kept beside its embeddings, or its id could come back as another's
            source = self.source(dataset)
            if isinstance(source, StoredFeatures):
                raise DataError("Embeddings on disk are for training; measure on ImageFeatures or pictures.")
            data = source if isinstance(source, ImageFeatures) else self.of_pictures(source, views)
            made = self._made[id(dataset), views] = (dataset, source, data)
        return made[2]

    def names(self, dataset: Any) -> Name:
        """What to call the pictures of a dataset, by their positions in its embeddings."""
        data = self.of(dataset)
        source = self._made[id(dataset), 0][1]
        if isinstance(source, ImageFeatures):
            return picture_names(None)
        lost = set(data.skipped)
        return picture_names(source.select([row for row in range(len(source)) if row not in lost]) if lost else source)

    def of_pictures(self, images: LabelledImages, views: int) -> ImageFeatures:
        """Embeddings of pictures; see `embed_images`."""
        cache_dir: Any = self.args.cache_dir
        if cache_dir is None or cache_dir is True:
            cache_dir = cache_root() / "features"
        return embed_images(
            self.embedder,
            images,
            views=views,
            seed=self.args.seed,
            batch_size=self.args.embed_batch_size,
            cache_dir=cache_dir or None,
            on_error=self.args.on_error,
            progress=not self.args.disable_tqdm,
            accelerator=self.accelerator,
        )
