"""Upload of a folder to the Hugging Face hub."""

from pathlib import Path

from megalodon_jax.errors import ConfigError, ConvertError


def push_to_hub(folder: str | Path, repo_id: str, *, private: bool | None = None) -> str:
    """Uploads a folder as a model repository, which is created if it does not exist.

    The token is that of `hf auth login` or of the environment variable HF_TOKEN.

    Args:
      folder: the local folder.
      repo_id: "owner/name".
      private: whether a new repository is private; None: the owner's default.

    Returns:
      The URL of the commit.

    Raises:
      ConfigError: huggingface_hub is not installed.
      ConvertError: the hub refused the upload, or gives no answer.
    """
    require_hub()
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
        return str(api.upload_folder(repo_id=repo_id, folder_path=str(folder)))
    # The types of its HTTP client's errors differ between releases of the package.
    except Exception as error:
        text = " ".join(str(error).split())
        raise ConvertError(
            f"{folder} was written, but could not be uploaded to {repo_id!r}: {text:.400}"
        ) from error


def require_hub() -> None:
    """Checks that an upload is possible here.

    Raises:
      ConfigError: huggingface_hub is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "an upload needs the package huggingface_hub; install it with "
            'pip install "megalodon-flax[hub]", or leave --push out'
        ) from error
