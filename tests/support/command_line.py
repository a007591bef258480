"""The command line as a function."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from ops.cli.main import app


def ratchet(home: Path, *words: str, said: str = "", columns: int = 250) -> Result:
    """Run ``ratchet`` with this home in a terminal of this width. Raises the errors that the program would show."""
    result = CliRunner().invoke(app, ["--set", f"home={home}", *words], input=said, env={"COLUMNS": str(columns)})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result
