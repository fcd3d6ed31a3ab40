"""The command line, run in the process of the tests."""

from __future__ import annotations

import sys

import pytest

from latentmodal.experiments import cli


def main(*arguments: object) -> int:
    """The exit code of `latentmodal` with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["latentmodal", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as end:
            return int(end.code or 0)
    return 0
