"""Formal languages: answers are those of slow rules on lists, guesses without memory stay at chance."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

from clplat.streams.base import JoinedData
from clplat.streams.batch import IGNORE
from clplat.streams.diagnostic.formal_languages import NO, TAGS, YES, FormalLanguages
from clplat.streams.diagnostic.languages import (
    brackets,
    counting,
    cyclic_table,
    group,
    largest_count,
    permutation_table,
    repeated,
)

SMALL: dict[str, Any] = {"lengths": [40], "train_rows": 500, "val_rows": 50, "test_rows": 50, "multiples": [2]}
ALL = ["parity", "cyclic", "S3", "A5", "S5", "aa", "abab", "anbn", "anbncn", "dyck"]


def prepared(*languages: str, **options: Any) -> FormalLanguages:
    stream = FormalLanguages(languages=list(languages), **(SMALL | options))
    stream.prepare()
    return stream


def even(permutation: tuple[int, ...]) -> bool:
    return sum(a > b for a, b in itertools.combinations(permutation, 2)) % 2 == 0


def plain_answers(name: str, symbols: list[int]) -> list[int]:
    """The definition, symbol by symbol."""
    if name in ("parity", "cyclic"):
        return [sum(symbols[: t + 1]) % (2 if name == "parity" else 5) for t in range(len(symbols))]
    if name[0] in "SA":
        elements = [p for p in itertools.permutations(range(int(name[1]))) if name[0] == "S" or even(p)]
        product, found = tuple(range(int(name[1]))), []
        for symbol in symbols:
            product = tuple(elements[symbol][i] for i in product)
            found.append(elements.index(product))
        return found
    if name in ("aa", "abab"):
        text = "".join("ab"[symbol] for symbol in symbols)
        asked = name[-1]
        words = re.compile(f"({name})*")
        return [
            int(words.fullmatch(text[: t + 1]) is not None) if text[t] == asked else IGNORE for t in range(len(text))
        ]
    if name in ("anbn", "anbncn"):
        letters = len(name) // 2
        text, found = "".join("abc"[s] if s < letters else "#" for s in symbols), []
        for t, letter in enumerate(text):
            if letter == "#":
                word = text[:t].rpartition("#")[2]
                assert re.fullmatch("a+b+" if letters == 2 else "a+b+c+", word)
                found.append(int(len({word.count(x) for x in "abc"[:letters]}) == 1))
            else:
                found.append(IGNORE)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("name", [name for name in ALL if name != "dyck"])
def test_answers_are_those_of_the_definition(name: str) -> None:
    stream = prepared("parity", name) if name != "parity" else prepared("parity")
    task, first = stream.tasks[-1], stream.first
    offset = NO if name in ("aa", "abab", "anbn", "anbncn") else first
    for data in (task.train, task.val.data, task.test.data, stream.probes[-1].data):
        batch = data.batch(torch.arange(20))
        for row, targets in zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True):
            assert row[0] == TAGS + len(stream.tasks) - 1 and targets[0] == IGNORE
            answers = plain_answers(name, [token - first for token in row[1:]])
            assert targets[1:] == [a if a == IGNORE else a + offset for a in answers]
            assert any(target != IGNORE for target in targets)


@pytest.mark.parametrize(("kinds", "depth"), [(2, 2), (2, 4), (3, 5)])
def test_brackets_match_stay_within_their_depth_and_are_asked_for_between_closing_ones(kinds: int, depth: int) -> None:
    symbols, answers = brackets(kinds, depth).draw(200, 61, torch.Generator().manual_seed(0))
    deepest = 0
    for row, asked in zip(symbols.tolist(), answers.tolist(), strict=True):
        stack: list[int] = []
        for t, symbol in enumerate(row):
            if symbol % 2:
                assert stack.pop() == symbol // 2
            else:
                stack.append(symbol // 2)
            deepest = max(deepest, len(stack))
            follows = row[t + 1] if t + 1 < len(row) else None
            if asked[t] != IGNORE:
                assert symbol % 2 and asked[t] == 2 * stack[-1] + 1
            if follows is not None:
                assert (asked[t] != IGNORE) == bool(symbol % 2 and follows % 2)
                assert asked[t] in (IGNORE, follows)
    assert deepest == depth


@pytest.mark.parametrize("order", [2, 5, 7])
def test_cyclic_tables_add(order: int) -> None:
    assert cyclic_table(order).tolist() == [[(a + b) % order for b in range(order)] for a in range(order)]


@pytest.mark.parametrize(("degree", "even_only", "order"), [(3, False, 6), (5, False, 120), (5, True, 60)])
def test_permutation_tables_are_groups_that_do_not_commute(degree: int, even_only: bool, order: int) -> None:
    table = permutation_table(degree, even=even_only)
    everything = torch.arange(order)
    assert table.shape == (order, order)
    assert bool((table.sort(0).values == everything.unsqueeze(1)).all())
    assert bool((table.sort(1).values == everything).all())
    assert bool((table[0] == everything).all()) and bool((table[:, 0] == everything).all())
    assert bool((table[table] == table[everything.view(-1, 1, 1), table]).all()), "(ab)c = a(bc)"
    assert bool((table != table.T).any())


@pytest.mark.parametrize("language", [group(cyclic_table(2)), group(cyclic_table(5)), group(permutation_table(3))])
def test_products_are_equally_likely_whatever_the_last_symbol(language: Any) -> None:
    symbols, answers = language.draw(4000, 9, torch.Generator().manual_seed(1))
    size = language.symbols
    pairs = (symbols[:, 8] * size + answers[:, 8]).bincount(minlength=size**2)
    assert (pairs - 4000 / size**2).abs().max() < 5 * (4000 / size**2) ** 0.5
    assert language.chance == 1 / size


@pytest.mark.parametrize("letters", [2, 3])
def test_no_single_count_of_a_word_tells_whether_it_is_right(letters: int) -> None:
    symbols, answers = counting(letters).draw(6000, 63, torch.Generator().manual_seed(1))
    # First words only: that a row ends cuts long words off.
    seen: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for row, asked in zip(symbols.tolist(), answers.tolist(), strict=True):
        end = row.index(letters)
        for letter in range(letters):
            seen[letter, row[:end].count(letter)][asked[end]] += 1
        assert end % letters == 0, "nor does the length of a word modulo the number of letters"
    largest = largest_count(letters, 63)
    assert seen.keys() == {(letter, n) for letter in range(letters) for n in range(2, largest + 1)}
    for counts in seen.values():
        total = counts.total()
        assert abs(counts[1] - total / 2) < 4.5 * (total / 4) ** 0.5


def test_longer_rows_have_counts_that_training_never_has() -> None:
    for letters in (2, 3):
        assert largest_count(letters, 127) > largest_count(letters, 63) >= 7


@pytest.mark.parametrize("language", [repeated(2), repeated(4), counting(2), counting(3)])
def test_yes_and_no_are_asked_for_alike(language: Any) -> None:
    _, answers = language.draw(3000, 128, torch.Generator().manual_seed(1))
    asked = answers[answers != IGNORE]
    assert abs(asked.double().mean() - 0.5) < 0.02


@pytest.mark.parametrize("kinds", [2, 3])
def test_every_kind_of_bracket_is_asked_for_alike_whichever_closed_before(kinds: int) -> None:
    symbols, answers = brackets(kinds, 4).draw(3000, 40, torch.Generator().manual_seed(1))
    known = answers != IGNORE
    pairs = ((symbols[known] // 2) * kinds + answers[known] // 2).bincount(minlength=kinds**2)
    share = pairs / pairs.sum()
    assert (share - 1 / kinds**2).abs().max() < 0.01


def test_a_single_row_of_each_length_is_what_periodic_languages_have() -> None:
    for task in prepared("aa", "abab").tasks:
        assert len(task.train.inputs.unique(dim=0)) == 1


def test_no_row_is_in_two_sets_where_a_language_has_enough() -> None:
    names = [name for name in ALL if name not in ("aa", "abab")]
    for task in prepared(*names, lengths=[48]).tasks:
        sets = [{tuple(row) for row in data.inputs.tolist()} for data in (task.train, task.val.data, task.test.data)]
        assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2]), task.name


def test_the_seed_draws_the_training_rows_alone() -> None:
    first, again, other = (prepared("S3", "dyck", seed=seed).tasks for seed in (3, 3, 4))
    for number in range(2):
        assert first[number].train.digest == again[number].train.digest != other[number].train.digest
        assert first[number].test.data.digest == other[number].test.data.digest


def test_a_language_may_come_again_longer_and_keeps_its_name_token() -> None:
    stream = prepared("parity", "S3", "parity", lengths=[40, 40, 80])
    assert [task.name for task in stream.tasks] == ["parity-40", "S3-40", "parity-80"]
    batch = JoinedData([task.train for task in stream.tasks]).batch(torch.tensor([0, 500, 1000]))
    assert batch.inputs.shape == (3, 80) and batch.inputs[:, 0].tolist() == [TAGS, TAGS + 1, TAGS]
    assert {probe.name: probe.data.batch(torch.arange(1)).inputs.shape[1] for probe in stream.probes} == {
        "parity-40-x2": 80, "S3-40-x2": 80, "parity-80-x2": 160,
    }  # fmt: skip


def test_chance_levels_are_in_the_record() -> None:
    facts = prepared("parity", "S5", "anbn", "dyck", bracket_kinds=3).facts()
    chances = {name: facts[f"{name}-40.chance"] for name in ("parity", "S5", "anbn", "dyck")}
    assert chances == {"parity": 1 / 2, "S5": 1 / 120, "anbn": 1 / 2, "dyck": 1 / 3}


def test_answers_to_membership_are_yes_and_no() -> None:
    targets = prepared("anbncn").tasks[0].train.targets
    assert set(targets.unique().tolist()) == {IGNORE, NO, YES}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"languages": []}, "languages: at least one"),
        ({"languages": ["parrity"]}, "languages: 'parrity' is none of parity, cyclic"),
        ({"languages": ["S3", "S3"]}, "languages, lengths: two tasks are the same"),
        ({"lengths": [23]}, "lengths: at least 24 tokens a row, got"),
        ({"lengths": [32, 64]}, "lengths: one value for all tasks, or one for each of the 1"),
        ({"modulus": 1}, "modulus: at least 2"),
        ({"bracket_kinds": 1}, "bracket_kinds: at least 2"),
        ({"depth": 1}, "depth: at least 2"),
        ({"multiples": [0]}, "multiples: different whole numbers from 2"),
        ({"val_rows": 0}, "val_rows: at least 1"),
    ],
)
def test_a_bad_option_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FormalLanguages(**(SMALL | {"languages": ["parity"]} | options))
