"""How a model and its metrics show themselves in a notebook: as a table, with user text as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .description import measured_on
from .tables import Table, percent

_MOST = 50  # rows of a table on a page
_NAMES = 20


class ShownMetrics(dict[str, Any]):
    """Metrics by name, as `evaluate`, `measure` and `cross_validate` return them: a dict; notebooks show tables."""

    def _repr_html_(self) -> str:
        if "accuracy" not in self:
            rows = [[name, value] for name, value in self.items() if isinstance(value, (int, float, str))]
            return Table(["metric", "value"], rows, digits=4).html()
        interval = self.get("accuracy_interval")
        between = f" (95 %: {percent(interval[0])} to {percent(interval[1])})" if interval else ""
        summary: list[list[Any]] = [["accuracy", f"{percent(self['accuracy'])}{between}"]]
        if "zero_shot_accuracy" in self:
            summary.append(["zero-shot", percent(self["zero_shot_accuracy"])])
        summary += [["macro F1", percent(self["macro_f1"])]] if "macro_f1" in self else []
        summary.append(["measured on", measured_on(self)])
        per_class = self.get("per_class")
        return Table(["", ""], summary).html() + (_per_class(per_class) if isinstance(per_class, Mapping) else "")


def _per_class(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Classes with pictures, zero-shot and accuracy; those that gained least first where there are many."""

    def gain(item: tuple[str, Mapping[str, Any]]) -> float:
        return float(item[1]["accuracy"] - item[1].get("zero_shot_accuracy", 0.0))

    items = list(rows.items())
    left = len(items) - _MOST
    if left > 0:
        items = sorted(items, key=gain)[:_MOST]
    cells = [
        [
            name, int(row["support"]),
            percent(row["zero_shot_accuracy"]) if "zero_shot_accuracy" in row else "",
            percent(row["accuracy"]),
        ]
        for name, row in items
    ]  # fmt: skip
    caption = f"The {_MOST} classes that gained least; {left} more are in per_class." if left > 0 else None
    return Table(["class", "pictures", "zero-shot", "accuracy"], cells, caption=caption).html()


class ShownInNotebooks:
    """What a notebook shows of a model whose `config` is a `TaskResConfig`."""

    config: Any

    def _repr_html_(self) -> str:
        config = self.config
        names = list(config.class_names)
        more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
        base = config.base_model_name_or_path or "a model without a name"
        commit = f" at {config.base_model_revision[:12]}" if config.base_model_revision else ""
        training, drawn = config.training or {}, config.few_shot or {}
        rows: list[list[Any]] = [
            ["base model", f"{base}{commit}"],
            [f"{len(names)} classes", ", ".join(names[:_NAMES]) + more],
            ["templates", ", ".join(config.templates or []) or "class descriptions"],
        ]
        how = training.get("recipe") or training.get("method")
        count = f", {drawn['num_images']} pictures" if drawn.get("num_images") else ""
        rows.append(["trained", f"{how}{count}" if how else "not yet: zero-shot"])
        if config.strength != 1.0:
            rows.append(["strength", f"{config.strength:g} (1 as trained, 0 zero-shot)"])
        metrics = config.metrics or {}
        for key, name in (("map", "mAP"), ("micro_f1", "micro F1")):
            if "map" in metrics:
                beside = f", zero-shot {percent(metrics[f'zero_shot_{key}'])}" if f"zero_shot_{key}" in metrics else ""
                rows.append([name, f"{percent(metrics[key])}{beside}: {measured_on(metrics)}"])
        if "accuracy" in metrics:
            before = metrics.get("zero_shot_accuracy")
            beside = f", zero-shot {percent(before)}" if before is not None else ""
            rows.append(["accuracy", f"{percent(metrics['accuracy'])}{beside}: {measured_on(metrics)}"])
        return Table(["TaskRes classifier", ""], rows).html()
