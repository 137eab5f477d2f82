"""The door to data sets on the Hugging Face hub: their files, in the hub's own cache on this machine.

Only the files that a recipe names are fetched. What is in them is read as any other file is.
"""

from pathlib import Path

from qlora_trainer.errors import DataError


def fetch(place: str, pattern: str, *, download: bool) -> Path | None:
    """Folder that holds the named files of a data set.

    Args:
        place: ``owner/name`` or ``owner/name@revision``.
        pattern: which files, as a shell has it.
        download: get what is not on this machine yet.

    Returns:
        The folder; None where nothing may be downloaded and the data set is not on this machine.

    Raises:
        DataError: the hub has no such data set or revision for this login, or cannot be reached.
    """
    # Imported here because local files must not pay for the hub client.
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError  # noqa: PLC0415

    name, _, revision = place.partition("@")
    try:
        folder = snapshot_download(
            name,
            repo_type="dataset",
            revision=revision or None,
            allow_patterns=[pattern],
            local_files_only=not download,
        )
    except LocalEntryNotFoundError as error:
        if not download:
            return None
        raise DataError(
            f"{place}: is not in the local hub cache, and the hub cannot be reached. Connect, or download the data set "
            "elsewhere and give its folder as path"
        ) from error
    except (HfHubHTTPError, ValueError) as error:
        raise DataError(
            f"{place}: the hub has no such data set or revision for this login ({error}). Check the spelling, and "
            "`hf auth whoami` for gated data sets"
        ) from error
    return Path(folder)
