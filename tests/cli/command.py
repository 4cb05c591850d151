"""The command line, called in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner, Result

from flashgen.artifact.store import Artifact, open_artifact
from flashgen.cli.app import app


def flashgen(*arguments: str | Path) -> Result:
    """Outcome of `flashgen ARGUMENTS`: exit code, stdout and stderr."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def made_by(*arguments: str | Path) -> Artifact:
    """The artifact whose path `flashgen ARGUMENTS` prints."""
    result = flashgen(*arguments, "--debug")
    assert result.exit_code == 0, result.stderr
    return open_artifact(result.stdout.removesuffix("\n"))


def planned_by(*arguments: str | Path) -> dict[str, Any]:
    """What `flashgen ARGUMENTS --plan` prints."""
    result = flashgen(*arguments, "--plan", "--json", "--debug")
    assert result.exit_code == 0, result.stderr
    planned: dict[str, Any] = json.loads(result.stdout)
    return planned


def refused(code: int, *arguments: str | Path) -> str:
    """The one line on stderr of `flashgen ARGUMENTS`, which prints nothing else and ends with `code`."""
    result = flashgen(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("error: ").removesuffix("\n")
