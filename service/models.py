"""Model ids: which base model and which committed checkpoint each id stands for."""

from dataclasses import dataclass

from service.errors import ApiError


@dataclass(frozen=True)
class ServedModel:
    """A model that requests can name."""

    id: str
    base: str
    """Name of the base model in the service YAML."""
    checkpoint: str | None
    """URI of the committed checkpoint; None for the base model."""


def model_not_found(model_id: str) -> ApiError:
    """Return the error for a model that does not exist in the caller's project."""
    return ApiError(
        status=404,
        message=f"The model {model_id[:200]!r} does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )
