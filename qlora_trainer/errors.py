"""Everything that this package raises on purpose, one class per thing the reader can do about it.

    TrainerError
    ├── RecipeError           mend the recipe
    ├── DataError             mend the data file
    ├── BaseModelError        name another base model, or complete its folder
    ├── RunFolderError        choose another run folder, or make room on the disk
    ├── MissingPackageError   install an extra
    ├── TrainingError         change training settings or rows
    ├── HubError              log in to the hub, or name another repository
    ├── VerificationError     do not use the file that was written
    └── Interrupted           run the same command again to go on

Every message says what is wrong with the value, where, and what to do.
"""


class TrainerError(Exception):
    """A problem that the reader of the message can mend."""

    exit_code = 2


class RecipeError(TrainerError):
    """The recipe cannot be read or asks for something impossible; holds all problems of the file."""


class DataError(TrainerError):
    """A data file is missing, malformed, or leaves nothing to train on."""


class BaseModelError(TrainerError):
    """The base model is absent, incomplete or unsafe to load."""


class RunFolderError(TrainerError):
    """The run folder belongs to another recipe, or cannot be written."""


class MissingPackageError(TrainerError):
    """The recipe asks for something that needs an optional package."""


class HubError(TrainerError):
    """The hub does not take what is sent: no login, no right to write, or no connection."""

    exit_code = 3


class TrainingError(TrainerError):
    """Training cannot go on, such as a loss that is not a number."""

    exit_code = 3


class VerificationError(TrainerError):
    """A file that was written does not give back what was put in."""

    exit_code = 3


class Interrupted(TrainerError):  # noqa: N818 - nothing went wrong
    """Ctrl-C or SIGTERM; the state was saved and the same command goes on from it."""

    exit_code = 130


def reason_of(error: OSError | UnicodeError) -> str:
    """Why a file could not be read, in plain words and without what the message says anyway."""
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    return str(error.strerror if isinstance(error, OSError) and error.strerror else error)
