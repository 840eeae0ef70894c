"""docs/self_modifying.md: its example runs as printed."""

from __future__ import annotations

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "self_modifying.md").read_text()


def test_the_pages_example_runs_as_printed() -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
    assert "state_100" in names
