"""What a model's architecture says without its weights: whether transformers knows it, and every parameter's shape."""

from pathlib import Path

from training.models.files import ModelError, first_line


def check_architecture(directory: Path, source: str, *, trust_remote_code: bool) -> None:
    """Make sure that transformers can read the model's configuration.

    Args:
        directory: The model's files on this node; its weights are not needed.
        source: What messages call the model.
        trust_remote_code: Whether code that lies beside them may run.

    Raises:
        ModelError: it cannot.
    """
    _load_config(directory, source, trust_remote_code)


def parameter_shapes(directory: Path, source: str, *, trust_remote_code: bool) -> dict[str, tuple[int, ...]]:
    """Every parameter's name and shape as the model is built, before anything packs or quantises it.

    Raises:
        ModelError: the model cannot be built.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = _load_config(directory, source, trust_remote_code)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _load_config(directory: Path, source: str, trust_remote_code: bool):
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # each architecture checks its fields in its own way
        raise ModelError(
            f"model {source}: transformers cannot read its config.json ({first_line(error)}). Name a model that the installed "
            "transformers knows; one that needs code of its own also needs trust_remote_code: true."
        ) from error
