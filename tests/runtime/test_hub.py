from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from qlora_trainer.errors import HubError
from qlora_trainer.runtime import hub
from qlora_trainer.runtime.hub import publish, require_repository_name
from tests.hub_stand_in import OWNER, TOKEN, Answer, StandIn, serving

CARD = b"---\ntags: [a]\n---\n# Card\n"
REPOSITORY = f"{OWNER}/tuned"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    with serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        # What a server answers with 5xx is asked again after a pause.
        monkeypatch.setattr("time.sleep", lambda _seconds: None)
        yield found


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path | bytes]:
    (tmp_path / "model.safetensors").write_bytes(b"weights" * 100)
    (tmp_path / "config.json").write_text("{}")
    return {
        "model.safetensors": tmp_path / "model.safetensors",
        "config.json": tmp_path / "config.json",
        "README.md": CARD,
    }


def breaking(part: str, answer: Answer) -> object:
    return lambda call: answer if part in call else None


def test_files_arrive_whole_in_one_commit_of_a_private_repository(
    stand_in: StandIn, files: dict[str, Path | bytes]
) -> None:
    published = publish(files, REPOSITORY, public=False, message="int4")
    assert published.url == f"{stand_in.url}/{REPOSITORY}"
    assert published.notes == ()
    assert stand_in.private == {REPOSITORY: True}
    assert stand_in.commits == [(REPOSITORY, "int4", sorted(files))]
    held = stand_in.repositories[REPOSITORY]
    assert held["model.safetensors"] == b"weights" * 100
    assert held["README.md"] == CARD


def test_a_second_push_goes_into_the_same_repository_and_names_what_else_is_there(
    stand_in: StandIn, files: dict[str, Path | bytes]
) -> None:
    publish(files, REPOSITORY, public=True, message="first")
    assert stand_in.private == {REPOSITORY: False}
    again = publish({"README.md": CARD + b"more\n"}, REPOSITORY, public=True, message="second")
    assert [message for _, message, _ in stand_in.commits] == ["first", "second"]
    assert again.notes == ("The repository also holds files of earlier commits: config.json, model.safetensors.",)


def test_a_public_repository_is_written_only_when_that_was_said(
    stand_in: StandIn, files: dict[str, Path | bytes]
) -> None:
    stand_in.repositories[REPOSITORY], stand_in.private[REPOSITORY] = {}, False
    with pytest.raises(HubError, match=r"is public already.*--public"):
        publish(files, REPOSITORY, public=False, message="m")
    assert stand_in.commits == []


def test_without_a_login_nothing_is_asked(
    stand_in: StandIn, files: dict[str, Path | bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "get_token", lambda: None)
    with pytest.raises(HubError, match=r"no login.*hf auth login"):
        publish(files, REPOSITORY, public=False, message="m")
    assert stand_in.calls == []


def test_a_wrong_login_is_told_without_repeating_it(
    stand_in: StandIn, files: dict[str, Path | bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = "hf_" + "wrong1" * 6
    monkeypatch.setenv("HF_TOKEN", wrong)
    with pytest.raises(HubError, match="does not take this login") as told:
        publish(files, REPOSITORY, public=False, message="m")
    assert wrong not in str(told.value)
    assert stand_in.repositories == {}


def test_another_owners_name_is_refused_by_the_hub(stand_in: StandIn, files: dict[str, Path | bytes]) -> None:
    with pytest.raises(HubError, match=r"somebody/tuned.*rights"):
        publish(files, "somebody/tuned", public=False, message="m")


@pytest.mark.parametrize(
    ("part", "status"),
    [
        ("validate-yaml", 400),
        ("/preupload/", 403),
        ("/lfs/objects/batch", 403),
        ("/lfs/upload/", 400),
        ("/commit/", 413),
        ("/commit/", 500),
    ],
)
def test_a_failure_in_the_middle_leaves_the_repository_as_it_was(
    stand_in: StandIn, files: dict[str, Path | bytes], part: str, status: int
) -> None:
    stand_in.repositories[REPOSITORY], stand_in.private[REPOSITORY] = {"config.json": b"old"}, True
    stand_in.broken = breaking(part, (status, b'{"error": "no room", "errors": [], "warnings": []}'))  # type: ignore[assignment]
    with pytest.raises(HubError, match="did not arrive, the repository holds what it held before"):
        publish(files, REPOSITORY, public=False, message="m")
    assert stand_in.repositories[REPOSITORY] == {"config.json": b"old"}
    assert stand_in.commits == []


@pytest.mark.parametrize("part", ["/api/models/me/tuned", "/preupload/", "/lfs/objects/batch", "/commit/"])
@pytest.mark.parametrize("reply", [b"<html>", b"[]", b"null", b'{"files": [{}], "objects": [{}]}', b'"\\u0007x"'])
def test_replies_that_make_no_sense_become_one_clear_error(
    stand_in: StandIn, files: dict[str, Path | bytes], part: str, reply: bytes
) -> None:
    if part != "/api/models/me/tuned":
        stand_in.repositories[REPOSITORY], stand_in.private[REPOSITORY] = {}, True
    stand_in.broken = breaking(part, (200, reply))  # type: ignore[assignment]
    with pytest.raises(HubError):
        publish(files, REPOSITORY, public=False, message="m")
    assert stand_in.commits == []


def test_what_the_hub_says_is_made_short_and_printable_and_the_token_is_taken_out(
    stand_in: StandIn, files: dict[str, Path | bytes]
) -> None:
    said = f"\\u001b[31m{TOKEN} " + "x" * 5000
    stand_in.broken = breaking("/preupload/", (403, f'{{"error": "{said}"}}'.encode()))  # type: ignore[assignment]
    with pytest.raises(HubError) as told:
        publish(files, REPOSITORY, public=False, message="m")
    assert TOKEN not in str(told.value)
    assert str(told.value).isprintable()
    assert len(str(told.value)) < 700


def test_no_connection_is_told(
    stand_in: StandIn, files: dict[str, Path | bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(HubError, match="me/tuned"):
        publish(files, REPOSITORY, public=False, message="m")


@pytest.mark.parametrize(
    "name", ["tuned", "me/", "/tuned", "me/a/b", "me/a b", "https://x/y", "me/..", "../x", "me/a--b"]
)
def test_what_is_no_repository_is_refused(name: str) -> None:
    with pytest.raises(HubError, match="owner/name"):
        require_repository_name(name)
