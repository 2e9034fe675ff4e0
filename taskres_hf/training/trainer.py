"""`TaskResTrainer`: frozen embeddings once, then epochs over them in an Accelerate loop."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers.trainer_utils import PredictionOutput, TrainOutput

from ..data.labelled import LabelledImages, class_counts
from ..embedding.augmentation import augment, crop_size
from ..embedding.embedder import Embedder
from ..embedding.features import ImageFeatures, embed_images
from ..embedding.stored import StoredFeatures
from ..errors import ArtifactError, ConfigurationError, DataError, FewShotError
from ..evaluation import accuracy, metrics_from_logits
from ..few_shot import few_shot_indices
from ..modeling_taskres import TaskResCLIPForImageClassification
from ..storage import cache_root, read_json, read_tensors, write_json, write_tensors
from .arguments import TaskResTrainingArguments
from .checkpoints import OPTIMIZER, STATE, EarlyStopping, list_checkpoints
from .enhanced_base import projection_inputs, tune_projection
from .gradient import loss_and_gradient, penalty_factor
from .recipes import Recipe, epoch_batches, learning_rate, make_recipe


class TaskResTrainer:
    """Trains the residual of a `TaskResCLIPForImageClassification`.

    Args:
        model: the classifier; trained in place.
        args: see `TaskResTrainingArguments`.
        train_dataset, eval_dataset: a `datasets.Dataset` with pictures and labels (matched to the model's classes by
            name), a `LabelledImages`, or `ImageFeatures` already computed.
        image_processor: found by the model when None.

    Attributes:
        log_history: one dict per epoch: epoch, loss, accuracy, learning_rate, and eval_accuracy if evaluated.
    """

    def __init__(
        self,
        model: TaskResCLIPForImageClassification,
        args: TaskResTrainingArguments | None = None,
        train_dataset: Dataset | LabelledImages | ImageFeatures | StoredFeatures | None = None,
        eval_dataset: Dataset | LabelledImages | ImageFeatures | None = None,
        image_processor: Any = None,
    ) -> None:
        self.model = model
        self.args = args or TaskResTrainingArguments()
        self.train_dataset = train_dataset
        self.eval_dataset = eval_dataset
        if image_processor is not None:
            model.image_processor = image_processor
        self.accelerator = Accelerator(
            cpu=self.args.use_cpu, log_with=self.args.report_to, project_dir=self.args.output_dir
        )
        if getattr(model, "hf_device_map", None) is None and getattr(model.clip, "hf_device_map", None) is None:
            model.to(self.accelerator.device)
        self.log_history: list[dict[str, Any]] = []
        self._embedder: Embedder | None = None
        self._features: dict[tuple[int, int], tuple[Any, ImageFeatures]] = {}

    # ------------------------------------------------------------------ training

    def train(self, resume_from_checkpoint: str | os.PathLike[str] | bool | None = None) -> TrainOutput:
        """Train the residual.

        Args:
            resume_from_checkpoint: a checkpoint folder, or True for the newest in `output_dir`. The settings and the
                data must be those of the interrupted run; the result then equals an uninterrupted run, bit for bit
                in one process on a CPU.

        Returns:
            `TrainOutput` with the number of steps, the last epoch's loss and its metrics.

        Raises:
            DataError: no training data, unlabelled or unknown classes. FewShotError: a class without any picture.
            ConfigurationError: the checkpoint is of another run, or training diverged.
        """
        if self.train_dataset is None:
            raise DataError("There is nothing to train on: pass train_dataset to TaskResTrainer.")
        images, data = self._training_data()
        head = self.model.classifier
        recipe = self._recipe(data)
        self._record(recipe, data.digest, len(data.labels))
        if self.args.enhanced_base:
            self._enhance(data)
        head.residual.grad = None  # whatever a caller or an earlier run left there
        optimizer = torch.optim.Adam(
            [head.residual], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )
        run = {"recipe": asdict(recipe), "data": data.digest, "seed": self.args.seed, "alpha": head.alpha}
        run |= {"views": self.args.views, "augment_online": self.args.augment_online}
        run |= {"enhanced_base": self.args.enhanced_base}
        start = self._resume(resume_from_checkpoint, optimizer, run)
        if self.args.report_to:
            self.accelerator.init_trackers("taskres", config=recipe.__dict__)
        step = self._make_step(recipe, optimizer, data, images)
        stopper = EarlyStopping(self.args.early_stopping_patience)
        steps, log = 0, self.log_history[-1] if self.log_history else {}
        bar = tqdm(
            total=recipe.num_train_epochs, initial=start, desc="Training", unit="epoch",
            disable=self.args.disable_tqdm or not self.accelerator.is_main_process,
        )  # fmt: skip
        for epoch in range(start, recipe.num_train_epochs):
            rate = learning_rate(recipe, epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate
            totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, examples
            for batch in self._batches(data, recipe, epoch):
                totals += step(epoch, *batch)
                steps += 1
            loss, correct = (totals[:2] / totals[2]).tolist()
            log = {"epoch": epoch + 1, "loss": loss, "accuracy": correct, "learning_rate": rate}
            if not math.isfinite(loss):
                raise ConfigurationError(
                    f"Training diverged in epoch {epoch + 1} (loss {loss}): lower learning_rate ({rate:g}) and check "
                    "the pictures. The model on disk is untouched."
                )
            if self.args.early_stopping_patience is not None:
                log["eval_accuracy"] = self._eval_accuracy()
            self.log_history.append(log)
            bar.set_postfix(
                {key: f"{log[key]:.3f}" for key in ("loss", "accuracy", "eval_accuracy") if key in log}, refresh=False
            )
            bar.update()
            if self.args.report_to:
                self.accelerator.log(log, step=epoch + 1)
            if self.args.save_epochs and (epoch + 1) % self.args.save_epochs == 0:
                self._checkpoint(epoch + 1, optimizer, run)
            if stopper.stop(log.get("eval_accuracy"), head.residual):
                break
        bar.close()
        stopper.restore(head.residual)
        head.residual.grad = None
        if self.args.report_to:
            self.accelerator.end_training()
        if self.args.push_to_hub and self.accelerator.is_main_process:
            self.push_to_hub()
        return TrainOutput(
            steps, float(log.get("loss", float("nan"))), {key: float(value) for key, value in log.items()}
        )

    def _batches(self, data: ImageFeatures | StoredFeatures, recipe: Recipe, epoch: int) -> Any:
        if isinstance(data, StoredFeatures):
            return data.batches(recipe.train_batch_size, self.args.seed, epoch, self.args.buffer_mb)
        return epoch_batches(len(data), len(data.image_embeds), recipe.train_batch_size, self.args.seed, epoch)

    def _enhance(self, data: ImageFeatures | StoredFeatures) -> None:
        """Put the enhanced base under the residual; the same data and seed give the same base on every process."""
        if isinstance(data, StoredFeatures) or not data.image_embeds.shape[-1]:
            raise ConfigurationError("enhanced_base needs cached embeddings: use views=V instead of augment_online.")
        head, config = self.model.classifier, self.model.config
        inputs, projection = projection_inputs(self.model.clip, self.model.tokenizer, self.model.class_prompts())
        shots = len(data) / len(self.model.class_names)
        shift = tune_projection(
            inputs, projection, head.base.cpu(), data,
            logit_scale=head.logit_scale, logit_bias=head.logit_bias, shots=shots, seed=self.args.seed,
        )  # fmt: skip
        head.shift = shift.to(head.base)
        config.enhanced_base = {"epochs": 50, "data_digest": data.digest, "seed": self.args.seed}

    def _make_step(
        self, recipe: Recipe, optimizer: torch.optim.Optimizer, data: ImageFeatures | StoredFeatures, images: Any
    ) -> Any:
        """A function of (epoch, rows, views) that makes one step and returns sums: loss, correct, examples.

        For embeddings on disk it takes (epoch, labels, embeddings) instead.
        """
        head = self.model.classifier
        factor = penalty_factor(recipe, head)
        device = head.residual.device
        dtype = head.residual.dtype
        labels = data.labels.to(device)
        one_process = self.accelerator.num_processes == 1
        embeds = None

        def stored(epoch: int, ids: Tensor, batch: Tensor) -> Tensor:
            batch = F.normalize(batch.to(device=device, dtype=dtype), dim=-1)
            loss, correct, head.residual.grad = loss_and_gradient(head, batch, ids.to(device), factor)
            optimizer.step()
            return torch.tensor([float(loss) * len(ids), float(correct), len(ids)], dtype=torch.float64)

        if isinstance(data, StoredFeatures):
            if not one_process or head.side != "text":
                raise ConfigurationError("Embeddings on disk are trained in one process, on the text side.")
            return stored
        if images is None:
            embeds = data.image_embeds.to(device=device, dtype=dtype)
            if head.side == "text":  # there the length of an image embedding does not matter
                embeds = F.normalize(embeds, dim=-1)

        def closed_form(epoch: int, rows: Tensor, views: Tensor) -> Tensor:
            assert embeds is not None
            batch = embeds[0].index_select(0, rows) if len(embeds) == 1 else embeds[views, rows]
            loss, correct, head.residual.grad = loss_and_gradient(head, batch, labels[rows], factor)
            optimizer.step()
            return torch.tensor([float(loss) * len(rows), float(correct), len(rows)], dtype=torch.float64)

        if images is None and one_process and self.args.closed_form and head.side == "text":
            return closed_form

        wrapped, prepared = self.accelerator.prepare(head, optimizer)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index

        def autograd(epoch: int, rows: Tensor, views: Tensor) -> Tensor:
            mine = rows[rank::world].to(device)
            if embeds is None:
                batch = self._augmented(images, mine.tolist(), epoch).to(device=device, dtype=dtype)
            else:
                batch = embeds[views[rank::world].to(device), mine]
            logits = wrapped(batch)
            # Sums over the whole batch: gradients of the processes are averaged, whatever share each one has.
            local = F.cross_entropy(logits, labels[mine], reduction="sum")
            regulariser = factor * head.residual.pow(2).sum()
            self.accelerator.backward(local * (world / len(rows)) + regulariser)
            prepared.step()
            prepared.zero_grad()
            correct = (logits.argmax(dim=1) == labels[mine]).sum()
            sums = torch.stack([local.detach() + regulariser.detach() * len(mine), correct.to(local.dtype)])
            sums = self.accelerator.reduce(sums, reduction="sum").double().cpu()
            return torch.cat([sums, torch.tensor([float(len(rows))], dtype=torch.float64)])

        return autograd

    def _augmented(self, images: LabelledImages, rows: Sequence[int], epoch: int) -> Tensor:
        """Embeddings [B, D] of freshly augmented pictures."""
        if not rows:
            return torch.zeros(0, self.model.classifier.base.shape[1])
        processor = self.model.image_processor
        size = crop_size(processor)
        parts = []
        batch_size = self.args.embed_batch_size or self.embedder.batch_size
        for start in range(0, len(rows), batch_size):
            chunk = rows[start : start + batch_size]
            pictures = [
                augment(images.image(row), size, random.Random(f"{self.args.seed} {images.digest(row)} {epoch}"))
                for row in chunk
            ]
            parts.append(self.embedder(pictures, augmented=True))
        return torch.cat(parts)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, eval_dataset: Any = None, metric_key_prefix: str = "") -> dict[str, Any]:
        """Metrics on the evaluation set, zero-shot beside trained.

        Returns:
            `accuracy`, `zero_shot_accuracy`, `macro_f1`, `loss`, `num_images` and `per_class`; shares from 0 to 1.
            Those of the trainer's own evaluation set are recorded in the model's config, for the card.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise DataError("There is nothing to evaluate on: pass eval_dataset.")
        data = self.embed(dataset)
        logits, zero_shot = self._logits(data)
        metrics = metrics_from_logits(logits, data.labels, self.model.class_names)
        metrics["zero_shot_accuracy"] = accuracy(zero_shot, data.labels)
        if eval_dataset is None:
            split = getattr(dataset, "split", None)
            self.model.config.metrics = {
                **metrics,
                **({"split": str(split)} if split else {}),
                "data_digest": data.digest,
            }
        return {f"{metric_key_prefix}_{key}" if metric_key_prefix else key: value for key, value in metrics.items()}

    def predict(self, test_dataset: Any) -> PredictionOutput:
        """Logits [N, K], labels [N] and metrics for a labelled dataset."""
        data = self.embed(test_dataset)
        logits, _ = self._logits(data)
        return PredictionOutput(logits.numpy(), data.labels.numpy(), metrics_from_logits(logits, data.labels))

    @torch.no_grad()
    def _logits(self, data: ImageFeatures) -> tuple[Tensor, Tensor]:
        head, embeds = self.model.classifier, data.image_embeds[0]
        return head(embeds).cpu(), head.zero_shot_logits(embeds).cpu()

    def _eval_accuracy(self) -> float:
        if self.eval_dataset is None:
            raise ConfigurationError("early_stopping_patience needs an eval_dataset: give a validation split.")
        data = self.embed(self.eval_dataset)
        return accuracy(self._logits(data)[0], data.labels)

    # ------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | os.PathLike[str] | None = None) -> None:
        """Save the artifact to `output_dir` (default: the run's own)."""
        self.model.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.accelerator.is_main_process)
        self.accelerator.wait_for_everyone()

    def push_to_hub(self, **kwargs: Any) -> Any:
        """Upload the artifact to `hub_model_id` (default: the name of `output_dir`)."""
        options = {"token": self.args.hub_token, "private": self.args.hub_private_repo, **kwargs}
        return self.model.push_to_hub(self.args.hub_model_id or Path(self.args.output_dir).name, **options)

    def _checkpoint(self, epoch: int, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> None:
        """`checkpoint-<epoch>`: the artifact, Adam's moments and the run's description; whole or absent."""
        if self.accelerator.is_main_process:
            folder = Path(self.args.output_dir) / f"checkpoint-{epoch}"
            staging = folder.with_name(f".{folder.name}.tmp")
            shutil.rmtree(staging, ignore_errors=True)
            self.model.save_pretrained(staging)
            state = optimizer.state[self.model.classifier.residual]
            write_tensors(staging / OPTIMIZER, {name: state[name] for name in ("exp_avg", "exp_avg_sq", "step")})
            write_json(staging / STATE, {"epoch": epoch, "run": run, "log_history": self.log_history})
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(staging, folder)
            if self.args.save_total_limit:
                for old in list_checkpoints(self.args.output_dir)[: -self.args.save_total_limit]:
                    shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self, source: Any, optimizer: torch.optim.Optimizer, run: dict[str, Any]) -> int:
        """Restore a checkpoint; the epoch to go on with."""
        if not source:
            self.log_history = []
            return 0
        if source is True:
            found = list_checkpoints(self.args.output_dir)
            if not found:
                raise ConfigurationError(
                    f"There is no checkpoint in {self.args.output_dir} to resume from. Train with save_epochs=N to "
                    "have some."
                )
            source = found[-1]
        folder = Path(source)
        state = read_json(folder / STATE)
        run = json.loads(json.dumps(run))
        different = [key for key in run if state.get("run", {}).get(key) != run[key]]
        if different:
            raise ConfigurationError(
                f"{folder} is a checkpoint of another run: {', '.join(different)} differ. Resume with the same "
                "settings and data, or start anew without resume_from_checkpoint."
            )
        residual = read_tensors(folder / "model.safetensors")[0]["residual"]
        moments = read_tensors(folder / OPTIMIZER)[0]
        parameter = self.model.classifier.residual
        if residual.shape != parameter.shape:
            raise ArtifactError(f"{folder} holds a residual {list(residual.shape)}, the model {list(parameter.shape)}.")
        with torch.no_grad():
            parameter.copy_(residual)
        optimizer.state[parameter] = {
            name: tensor.to(parameter.device if name != "step" else "cpu") for name, tensor in moments.items()
        }
        self.log_history = list(state["log_history"])
        return int(state["epoch"])

    # ------------------------------------------------------------------ data

    def _training_data(self) -> tuple[LabelledImages | None, ImageFeatures | StoredFeatures]:
        """The drawn pictures (for online augmentation) and their embeddings or, online, just their labels."""
        dataset = self.train_dataset
        names = self.model.class_names
        if isinstance(dataset, StoredFeatures):
            return None, self._stored(dataset)
        source = dataset if isinstance(dataset, ImageFeatures) else self._labelled(dataset)
        labels = source.labels.tolist() if isinstance(source, ImageFeatures) else source.labels
        counts = class_counts(labels, names)
        absent = [name for name, count in counts.items() if count == 0]
        if absent and self.args.on_short != "ignore":
            raise FewShotError(
                f"{len(absent)} of {len(names)} classes have no training picture: {absent[:5]}. Add at least one each, "
                "leave the classes out of the model, or accept it with on_short='ignore'."
            )
        if self.args.shots is not None:
            indices = few_shot_indices(
                labels, self.args.shots, self.args.seed, on_short=self.args.on_short, class_names=names
            )
            source = source.select(indices)
            rows = [source.indices[i] for i in range(len(source))] if isinstance(source, LabelledImages) else indices
            self.model.config.few_shot = {
                "shots": self.args.shots, "seed": self.args.seed, "num_images": len(indices), "indices": rows,
            }  # fmt: skip
        else:
            self.model.config.few_shot = {"shots": None, "seed": self.args.seed, "num_images": len(labels)}
        if isinstance(source, ImageFeatures):
            if self.args.augment_online:
                raise ConfigurationError("augment_online needs pictures; train_dataset holds embeddings.")
            return None, source
        if self.args.augment_online:
            crop_size(self.model.image_processor)
            digests = [source.digest(index) for index in range(len(source))]
            digest = hashlib.sha256(json.dumps([digests, source.labels, names]).encode()).hexdigest()
            blank = torch.zeros(1, len(source), 0)
            return source, ImageFeatures(blank, torch.tensor(source.labels), names, digest)
        return None, self._embed(source, self.args.views)

    def _stored(self, data: StoredFeatures) -> StoredFeatures:
        head, args = self.model.classifier, self.args
        if args.shots is not None or args.augment_online or args.views:
            raise ConfigurationError(
                "Embeddings on disk are taken as they are: shots, views and augment_online do not apply."
            )
        if data.class_names != self.model.class_names or data.shape[2] != head.base.shape[1]:
            raise DataError(
                f"{data.path} has {len(data.class_names)} classes and length {data.shape[2]}; the model has "
                f"{head.base.shape[0]} and {head.base.shape[1]}, or names or order differ."
            )
        self.model.config.few_shot = {"shots": None, "seed": args.seed, "num_images": len(data)}
        return data

    def _labelled(self, dataset: Any) -> LabelledImages:
        if not isinstance(dataset, LabelledImages):
            dataset = LabelledImages(
                dataset,
                image_column=self.args.image_column,
                label_column=self.args.label_column,
                default_names=self.model.class_names,
                drop_unlabelled=self.args.drop_unlabelled,
            )
        aligned: LabelledImages = dataset.aligned(self.model.class_names, self.args.label_map)
        return aligned

    def embed(self, dataset: Any, views: int = 0) -> ImageFeatures:
        """Embeddings of a dataset with the model's classes, which other trainers of the same model can train on.

        Args:
            dataset: as for `train_dataset`. views: 0 for the plain picture, V for V augmented views.
        """
        if isinstance(dataset, ImageFeatures):
            return dataset
        kept = self._features.get((id(dataset), views))
        if kept is None:  # the dataset is kept beside its embeddings, or its id could come back as another's
            kept = self._features[id(dataset), views] = (dataset, self._embed(self._labelled(dataset), views))
        return kept[1]

    @property
    def embedder(self) -> Embedder:
        """Base, processor and engine; made when first needed."""
        if self._embedder is None:
            engine, precision = self.args.engine, self.args.precision
            if self.args.recipe == "paper":  # as published unless asked otherwise
                engine = "torch" if engine == "auto" else engine
                precision = "fp32" if precision == "auto" else precision
            processor = self.model.image_processor
            options = (self.args.exact_preprocessing, self.args.draft_decoding)
            self._embedder = Embedder(self.model.clip, processor, engine, precision, *options)
        return self._embedder

    def _embed(self, images: LabelledImages, views: int) -> ImageFeatures:
        cache_dir = self.args.cache_dir
        if cache_dir is None or cache_dir is True:
            cache_dir = str(cache_root() / "features")
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

    def _recipe(self, data: ImageFeatures | StoredFeatures) -> Recipe:
        count = len(data)
        shots = self.args.shots or count / len(self.model.class_names)
        recipe = make_recipe(self.args.recipe, self.model.classifier, shots, count)
        if isinstance(data, StoredFeatures) and recipe.name == "auto":  # a batch and its logits fit the buffer too
            classes, dim = self.model.classifier.base.shape
            fitting = self.args.buffer_mb * 1_000_000 // (4 * (dim + 3 * classes))
            recipe = replace(recipe, train_batch_size=max(256, min(recipe.train_batch_size, fitting)))
        names = (
            "num_train_epochs",
            "learning_rate",
            "weight_decay",
            "warmup_lr",
            "train_batch_size",
            "penalty",
        )
        given = {name: getattr(self.args, name) for name in names if getattr(self.args, name) is not None}
        return replace(recipe, **given)

    def _record(self, recipe: Recipe, digest: str, count: int) -> None:
        """Provenance in the config: what `taskres info` and the card show."""
        values = asdict(recipe)
        values["recipe"] = values.pop("name")
        self.model.config.training = {
            **values, "seed": self.args.seed, "views": self.args.views, "augment_online": self.args.augment_online,
            "engine": None if self._embedder is None else self._embedder.engine.name,
        }  # fmt: skip
        self.model.config.data = {"train_digest": digest, "train_images": count}
        if self.args.dataset_name:
            self.model.config.data |= {"id": self.args.dataset_name, "name": self.args.dataset_name}
        self.model.config.metrics = None  # they spoke of the residual before this run
