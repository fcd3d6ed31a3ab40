"""What a user reads of a mistake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from latentmodal.experiments.errors import UserError


def one_line(step: Callable[[], Any]) -> str:
    """The message of the `UserError` that `step` raises, which must be one line."""
    with pytest.raises(UserError) as caught:
        step()
    message = str(caught.value)
    assert "\n" not in message
    return message
