"""Where a pretrained model lies: a folder here, or a repository of the Hugging Face hub, fetched once by its client."""

from __future__ import annotations

from pathlib import Path

from lightning_tex.data.tokenizer import is_hub_name
from lightning_tex.parallel.errors import UserFileError, UserValueError
from lightning_tex.pretrained.folder import CONFIG, TOKENIZER_FILES
from lightning_tex.pretrained.tensor_file import SUFFIX


def local_folder(name: str | Path, revision: str | None = None, config_only: bool = False) -> Path:
    """The folder here that holds a pretrained model.

    Args:
        name: a folder, or else a repository, ``owner/name``, which lies where the hub's client keeps its files
            (``HF_HOME``) and is not asked for again with ``HF_HUB_OFFLINE=1``.
        revision: of a repository: a branch, tag or commit.
        config_only: without weights.

    Raises:
        FileNotFoundError: there is no such folder, and the hub gives nothing of that name.
        ValueError: a revision of a folder.
    """
    folder = Path(name).expanduser()
    if not is_hub_name(name):
        if not folder.is_dir():
            raise UserFileError(f"pretrained={str(name)!r} is no folder here, and no repository's name, owner/name")
        if revision is not None:
            raise UserValueError(f"revision={revision!r} is of a repository, and pretrained={str(name)!r} is a folder")
        return folder
    from huggingface_hub import snapshot_download

    wanted = [CONFIG] if config_only else ["*.json", f"*{SUFFIX}", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the client has no common class for them
        reason = str(error).strip().partition("\n")[0]
        raise UserFileError(
            f"pretrained={str(name)!r} is no folder here, and the Hugging Face hub gives nothing of that name"
            f"{f' and revision {revision}' if revision else ''} ({type(error).__name__}: {reason})"
        ) from error
