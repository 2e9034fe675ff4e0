"""Classifiers over HTTP: several of them, one pass of a picture through each base, batches made of many requests.

    app = create_app({"pets": "my-classifier", "food": "me/food-taskres"})

is a FastAPI app: run it with uvicorn or gunicorn, mount it in another, or let `taskres serve` do it. Needs the extra:
pip install "taskres_hf[serve]".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import MissingExtraError

if TYPE_CHECKING:
    from fastapi import FastAPI

    from .classifiers import Models

_OPTIONS = ("device", "dtype", "base_model", "base_trust_remote_code", "strength")


def check_installed() -> None:
    """Refuse, before anything is loaded, to serve without the packages it takes.

    Raises:
        MissingExtraError: one of them is not installed.
    """
    try:
        import fastapi_offline
        import prometheus_client
        import python_multipart
        import uvicorn
    except ImportError as error:
        raise MissingExtraError(
            f'Serving needs packages of its own ({error.name} is missing): pip install "taskres_hf[serve]".'
        ) from error
    _ = fastapi_offline, prometheus_client, python_multipart, uvicorn


def create_app(models: Models, **settings: Any) -> FastAPI:
    """An app that serves classifiers; `app.state.service` takes others (`add`, `remove`) while it runs.

    Args:
        models: folders, Hub ids or loaded models: by name, or a list of them, named after their folder or repository
            (or as in `"pets=folder"`). Classifiers of the same base share it.
        **settings: see `service.settings.ServiceSettings`; and for those that are loaded `device`, `dtype`,
            `base_model`, `base_trust_remote_code` and `strength`, as in `from_pretrained`.

    Raises:
        MissingExtraError: the extra is not installed.
        ConfigurationError: an unknown setting or one out of range; no classifier, or two of one name.
        ArtifactError, BaseModelError, HubError: a classifier cannot be loaded.
    """
    check_installed()
    from .app import make_app
    from .classifiers import Classifiers
    from .observing import Metrics
    from .settings import ServiceSettings

    options = {name: settings.pop(name) for name in _OPTIONS if settings.get(name) is not None}
    kept = ServiceSettings.of({name: value for name, value in settings.items() if name not in _OPTIONS})
    metrics = Metrics(lambda: service.occupied)
    service = Classifiers(models, kept, metrics.batches.observe, **options)
    return make_app(service, metrics)
