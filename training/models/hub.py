"""Push of a directory to the Hugging Face Hub, and the check that it will be allowed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from configs.loading import ConfigError
from training.models.files import ModelError
from utils.errors import first_line

_TOO_MANY_REQUESTS = 429
_SHOWN_CHARACTERS = 300


def check_hub_access(key: str) -> None:
    """Check that the Hub accepts the token of this environment.

    Args:
        key: The key or option that asks for a push, in messages.

    Raises:
        ConfigError: There is no token, the Hub does not accept it, or it cannot be reached.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise ConfigError(
            f"{key}: HF_HUB_OFFLINE is set, so nothing can be pushed. Unset it, or remove {key}."
        )
    if huggingface_hub.get_token() is None:
        raise ConfigError(
            f"{key}: pushing to {constants.ENDPOINT} needs a token. Set HF_TOKEN to one with write access in the environment, or remove "
            f"{key}."
        )
    try:
        huggingface_hub.HfApi().whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == _TOO_MANY_REQUESTS:
            return  # the token is checked again by the push
        raise ConfigError(
            f"{key}: {constants.ENDPOINT} does not accept the token of HF_TOKEN ({first_line(error)}). Set one with write access, or "
            f"remove {key}."
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise ConfigError(
            f"{key}: {constants.ENDPOINT} cannot be reached ({first_line(error)}). Check HF_ENDPOINT and the network, or remove {key}."
        ) from error


def push_directory(
    directory: Path, files: Sequence[str], repository: str, *, private: bool | None, message: str
) -> str:
    """Upload files to a model repository in one commit, and return the repository's URL. Unchanged files are not uploaded.

    Args:
        directory: Local directory of the files.
        files: Paths relative to the directory.
        repository: Id of the repository, which is created if it does not exist.
        private: Whether a new repository is private; None: the default of the account.
        message: Message of the commit.

    Raises:
        ModelError: The Hub rejects the push, or it cannot be reached.
    """
    from huggingface_hub import HfApi

    with _push_errors(repository):
        api = HfApi()
        created = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=created.repo_id, folder_path=directory, allow_patterns=list(files), commit_message=message
        )
        return str(created)


@contextmanager
def _push_errors(repository: str) -> Iterator[None]:
    import httpx
    from huggingface_hub import constants

    try:
        yield
    # The Hub's client raises ValueError for a rejected model card, and RuntimeError if a large file cannot be sent.
    except (httpx.HTTPError, OSError, ValueError, RuntimeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        reason = " ".join(str(cause).split())[:_SHOWN_CHARACTERS] or type(cause).__name__
        raise ModelError(
            f"cannot push to {repository} on {constants.ENDPOINT} ({reason}). HF_TOKEN needs write access to it."
        ) from error
