"""The command line as a terminal sees it."""

from obc_tools.cli import commands as cli


def run(*arguments):
    """Run `obc` in this process; return its exit code."""
    try:
        cli.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code
    return 0


def assert_one_line(text, message):
    """Assert that the last of what was printed is one error line with a message, and no traceback came before."""
    last = text.replace("\r", "\n").strip().splitlines()[-1]
    assert last.startswith("obc: error: ")
    assert message in last
    assert "Traceback" not in text
