"""Fetch from a model hub, at one commit of a repository, or say at once why it does not come.

A revision is a branch, a tag or a commit; what came is named by its commit, so that the same
weights can be had again. A download that is cut off goes on where it was, and what is in the cache
is used where the hub does not answer.
"""

import contextlib
import logging
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from edgeclip.errors import EdgeclipError

CONNECT_S = 5
"""seconds to wait for the hub's own port; its client would retry for a minute and log each time"""


@contextlib.contextmanager
def hub(wanted: bool) -> Iterator[None]:
    """Silence the hub's client inside, and switch it offline where the hub does not answer."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    # The way through a proxy is its client's to find.
    proxied = urllib.request.getproxies().keys() & {"https", "all"}
    if wanted and not before and not proxied:
        url = urlsplit(constants.ENDPOINT)
        try:
            socket.create_connection((url.hostname, url.port or 443), timeout=CONNECT_S).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
        constants.HF_HUB_OFFLINE = before


class Snapshot(NamedTuple):
    """Files of a repository, as they are at one commit."""

    repository: str
    commit: str
    files: tuple[Path, ...]
    """one of each group that was asked for"""

    def __str__(self) -> str:
        return f"{self.repository}@{self.commit}"


def fetch(where: str, repository: str, revision: str, groups: Sequence[Sequence[str]]) -> Snapshot:
    """Return of each group of names the first file that a repository has.

    where: what messages call it. All files are of one commit. Raises `EdgeclipError` where a
    repository, revision or file is missing, gated, or neither cached nor to be fetched.
    """
    files: list[Path] = []
    commit = revision
    with hub(True):
        for names in groups:
            path = _first(where, repository, commit, names)
            commit = path.relative_to(_snapshots(path)).parts[0]
            files.append(path)
    return Snapshot(repository, commit, tuple(files))


def _first(where: str, repository: str, revision: str, names: Sequence[str]) -> Path:
    from huggingface_hub import errors, hf_hub_download

    missing: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except errors.LocalEntryNotFoundError as e:  # offline: it may be there
            missing = e
        except errors.EntryNotFoundError:
            continue
        except errors.GatedRepoError:
            what, do = "is gated: its owner gives access on request", "ask for it on the hub's page"
            raise EdgeclipError(
                where, f"{repository} {what}", f"{do}, then `hf auth login`"
            ) from None
        except errors.RepositoryNotFoundError:
            what = f"there is no repository {repository}, or it is private"
            raise EdgeclipError(where, what, "check ORG/NAME, or `hf auth login`") from None
        except errors.RevisionNotFoundError:
            what = f"{repository} has no revision {revision}"
            raise EdgeclipError(where, what, "give a branch, a tag or a commit") from None
        except (OSError, errors.HfHubHTTPError) as e:
            raise unreachable(where, f"{repository} at {revision}", e) from None
    if missing is not None:
        raise unreachable(where, f"{repository} at {revision}", missing)
    what = f"{repository} has no {' or '.join(names)} at {revision}"
    raise EdgeclipError(where, what, "give the path of a file of weights instead")


def _snapshots(path: Path) -> Path:
    """Return the folder of a repository's commits in the hub's cache."""
    return next(folder for folder in path.parents if folder.name == "snapshots")


def unreachable(where: str, what: str, error: Exception) -> EdgeclipError:
    """Return the error for weights that are neither cached nor to be fetched."""
    from huggingface_hub.constants import HF_HUB_CACHE

    kind, reason = type(error).__name__, " ".join(str(error).split())[:160]
    return EdgeclipError(
        f"weights {where}",
        f"{what} is not in the local cache {HF_HUB_CACHE} and cannot be fetched ({kind}: {reason})",
        "fetch the file on a machine that reaches the hub and give its path: "
        "weights: /path/to/model.safetensors",
    )
