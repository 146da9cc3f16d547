"""As on a machine where Triton's interpreter is on, or is not."""

from __future__ import annotations

import pytest

# Whoever decides by it who answers a call.
DECIDE = ("implementation", "checks", "rules.implementations")


def set_interpreted(monkeypatch: pytest.MonkeyPatch, value: bool) -> None:
    """For the rest of the test, calls are judged as if the interpreter were on, or off."""
    for module in DECIDE:
        monkeypatch.setattr(f"tilewise.plan.{module}.INTERPRETED", value)
