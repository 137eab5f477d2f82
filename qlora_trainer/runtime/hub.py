"""Publishing on the Hugging Face hub: files out, in one commit. The door to huggingface_hub for what is sent.

Which files may leave the machine is decided elsewhere. The login is the library's own (``hf auth login`` or HF_TOKEN);
its token is never returned, logged or repeated in a message.
"""

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from qlora_trainer.errors import HubError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
LONGEST_REPLY = 400
"""Characters of the hub's own words that a message repeats."""
ATTRIBUTES_FILE = ".gitattributes"
"""Made by the hub itself in every repository."""


@dataclass(frozen=True)
class Published:
    """What stands on the hub now.

    Attributes:
        url: of the repository.
        commit: its hexadecimal name.
        notes: what the owner should know, one sentence each.
    """

    url: str
    commit: str
    notes: tuple[str, ...]


def require_repository_name(name: str) -> str:
    """The name, if it is one.

    Raises:
        HubError: it is not of the form ``owner/name``.
    """
    if not REPOSITORY.fullmatch(name) or "--" in name or ".." in name:
        raise HubError(f"{name!r} names no repository. Give owner/name: letters, digits, '-', '_' and '.'")
    return name


def publish(files: Mapping[str, Path | bytes], repository: str, *, public: bool, message: str) -> Published:
    """Sends files to a model repository, which is made where it is missing. All appear in one commit, or none.

    Args:
        files: by path in the repository.
        repository: ``owner/name``.
        public: whether everybody may read it. A repository that is public already is refused without this.
        message: of the commit.

    Raises:
        HubError: there is no login, the repository cannot be written or is public, or the hub failed; the repository
            holds what it held before.
    """
    if get_token() is None:
        raise HubError("there is no login to the hub here. Log in first: hf auth login (or set HF_TOKEN)")
    api = HfApi()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with _told(f"{repository}: the hub does not take this login or this repository"):
            api.whoami()
            held = _repository(api, repository, public=public)
        with _told(f"{repository}: the files did not arrive, the repository holds what it held before"):
            commit = api.create_commit(
                repository,
                [CommitOperationAdd(name, content) for name, content in files.items()],
                commit_message=message,
            ).oid
    notes = [_plain(str(warning.message)) for warning in said if issubclass(warning.category, UserWarning)]
    others = sorted(held - {*files, ATTRIBUTES_FILE})
    if others:
        notes.append(f"The repository also holds files of earlier commits: {', '.join(map(_plain, others))}.")
    if not COMMIT.fullmatch(str(commit)):
        raise HubError(f"{repository}: the hub answered without a commit's name. Look there before you send it again.")
    return Published(f"{api.endpoint}/{repository}", commit, tuple(notes))


def _repository(api: HfApi, name: str, *, public: bool) -> set[str]:
    """Makes sure of the repository; gives the files that are in it."""
    try:
        found = api.model_info(name)
    except RepositoryNotFoundError:
        api.create_repo(name, private=not public, repo_type="model")
        return set()
    # Anything but a plain yes counts as public: a mistake the other way cannot be taken back.
    if found.private is not True and not public:
        raise HubError(f"{name} is public already: everybody could read the files. Add --public, or name another.")
    return {each.rfilename for each in found.siblings or ()}


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns whatever the client raises into one message; what a server sends back can break it in any way."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:  # a malformed reply breaks the client with whatever its parsing raises
        raise HubError(f"{what}: {_plain(str(error)) or type(error).__name__}") from error


def _plain(text: str) -> str:
    """Words of the hub on one short line, without control characters and without the login's token."""
    token = get_token()
    if token:
        text = text.replace(token, "(token)")
    line = " ".join("".join(one if one.isprintable() else " " for one in text).split())
    return line if len(line) <= LONGEST_REPLY else f"{line[:LONGEST_REPLY]} ..."
