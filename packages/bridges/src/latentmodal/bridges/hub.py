"""Components to and from the Hugging Face hub, where `huggingface_hub` is installed.

An address is `hf://owner/name`, or `hf://owner/name@revision`. Where nothing but a repository can
be meant, `hf://` may be left out. To load it may not, so that a folder misspelt is never looked for
on the net. What travels is the folder that `save_pretrained` writes, and whatever stands beside it,
such as a model card.
"""

import os
import re
from pathlib import Path
from types import ModuleType

from latentmodal.bridges.saved_files import first_line

SCHEME = "hf://"

_ADDRESS = re.compile(
    rf"(?:{SCHEME})?(?P<repo>[a-zA-Z0-9][\w.-]*/[a-zA-Z0-9][\w.-]*)"
    r"(?:@(?P<revision>[a-zA-Z0-9][\w./-]*))?",
    re.ASCII,
)


def is_address(source: str | os.PathLike[str]) -> bool:
    """Whether it means a repository rather than a folder."""
    return isinstance(source, str) and source.startswith(SCHEME)


def download(address: str, files: list[str]) -> Path:
    """Fetch `files` of a repository, or take them from the hub's own cache; returns their folder.

    Raises:
        ValueError: not an address, `huggingface_hub` is not installed, or the hub refuses.
    """
    repo, revision = split_address(address)
    hub = _hub(address)
    try:
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=files))
    except Exception as error:  # its transport has errors of its own, which are no OSError
        raise ValueError(f"{address}: cannot be fetched ({first_line(error)})") from error


def upload(folder: str | os.PathLike[str], address: str, *, private: bool, message: str) -> str:
    """Put the files of `folder` into a repository, made where there is none.

    Returns:
        Where to look at what was written.

    Raises:
        ValueError: as for `download`.
    """
    repo, revision = split_address(address)
    hub = _hub(address)
    try:
        api = hub.HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, revision=revision, commit_message=message
        )
    except Exception as error:
        raise ValueError(f"{address}: cannot be written ({first_line(error)})") from error
    return str(commit.commit_url)


def split_address(address: str) -> tuple[str, str | None]:
    """Repository and revision of an address.

    Raises:
        ValueError: it is none.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(f"{address}: is no address; write {SCHEME}owner/name, or …/name@revision")
    return match["repo"], match["revision"]


def _hub(address: str) -> ModuleType:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{address}: needs huggingface_hub; pip install huggingface_hub, or give a folder"
        ) from error
    return huggingface_hub
