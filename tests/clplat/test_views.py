"""How a learner answers by default and otherwise, and what a penalty may read: refused where two strategies collide."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from clplat.errors import ConfigError
from clplat.hooks import Hooks
from clplat.strategies.base import Hidden, Strategy


class _Viewed(Strategy):
    def __init__(self, *names: str, hidden: Hidden | None = None) -> None:
        self.names, self.hidden = names, hidden

    def views(self):
        return dict.fromkeys(self.names, nullcontext)


def test_the_default_view_stands_first_and_may_be_a_strategys_own() -> None:
    assert list(Hooks({}).views()) == ["default"]
    assert list(Hooks({"a": _Viewed("slow", "default"), "b": _Viewed("other")}).views()) == ["default", "slow", "other"]


@pytest.mark.parametrize("name", ["slow", "default"])
def test_two_strategies_with_a_view_of_one_name_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"strategies.b: another strategy of this run has a view '{name}' too"):
        Hooks({"a": _Viewed(name), "b": _Viewed(name)}).views()


def test_hidden_states_are_those_that_all_who_ask_agree_on() -> None:
    assert Hooks({"a": _Viewed()}).hidden is None
    assert Hooks({"a": _Viewed(), "b": _Viewed(hidden="all"), "c": _Viewed(hidden="all")}).hidden == "all"
    with pytest.raises(ConfigError, match="b and c need different hidden states of one forward pass .all, last."):
        assert Hooks({"b": _Viewed(hidden="all"), "c": _Viewed(hidden="last")}).hidden
