"""No bad call or command ends in torch's own words, in a traceback, or in silence."""

import pytest
import torch
from bad_calls import BAD_COMMANDS, furnish, rows, tried
from terminal import run

import obc_tools

ROWS = rows()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def unchanged(world):
    """Assert that nothing was written, and that gradients are computed as before."""
    before = contents(world.folder), torch.is_grad_enabled()
    yield
    assert (contents(world.folder), torch.is_grad_enabled()) == before


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.mark.parametrize(("entry", "change", "message"), ROWS, ids=[f"{row[0]}-{n}" for n, row in enumerate(ROWS)])
def test_a_bad_call_is_answered_in_the_library_s_own_words(entry, change, message, world):
    with pytest.raises((ValueError, OSError)) as raised:
        tried(world, entry, change)
    assert message
    assert message in " ".join(str(raised.value).split())


@pytest.mark.parametrize(("words", "message"), BAD_COMMANDS.items(), ids=[words or "nothing" for words in BAD_COMMANDS])
def test_a_bad_command_ends_with_one_line(words, message, world, capfd):
    assert run(*(word.replace("{}", str(world.folder)) for word in words.split())) == 2
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed
    said = " ".join("".join(letter if letter.isascii() else " " for letter in printed).split())
    assert message
    assert message in said
    if "obc: error: " in printed:
        assert printed.replace("\r", "\n").strip().splitlines()[-1].rpartition("obc: error: ")[2]


def test_the_table_has_calls_of_most_public_functions():
    assert len(ROWS) + len(BAD_COMMANDS) >= 300
    called = {entry.partition(".")[0] for entry, _, _ in ROWS}
    functions = {name for name in obc_tools.__all__ if name.islower()}
    assert functions - called <= {"explain", "find_plan"}
