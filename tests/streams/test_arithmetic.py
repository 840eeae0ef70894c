"""Generated word problems: every answer is right, every seed its own sequence."""

from __future__ import annotations

import re
from fractions import Fraction

from clplat.streams.arithmetic import problems

OPERATIONS = {"+": Fraction.__add__, "-": Fraction.__sub__, "*": Fraction.__mul__, "/": Fraction.__truediv__}
SIGNS = {
    "finds": "+", "gives": "?", "buys": "+", "loses": "-", "borrows": "-", "trade": "*", "By the evening": "*",
    "shared": "/", "equal bags": "/",
}  # fmt: skip


def test_every_answer_follows_from_the_question_alone() -> None:
    for problem in problems(500, seed=3):
        first, *events, _ = re.split(r"(?<=[.?]) ", problem.prompt.removeprefix("Question: ").partition("\n")[0])
        now = Fraction(re.search(r"\d+", first)[0])
        for event in events:
            sign = next(sign for word, sign in SIGNS.items() if word in event)
            sign = ("-" if " of them to " in event else "+") if sign == "?" else sign
            now = OPERATIONS[sign](now, Fraction(re.search(r"\d+", event)[0]))
            assert now.denominator == 1 and now > 0, problem
        assert problem.text.rpartition("#### ")[2] == str(now), problem


def test_every_line_of_work_is_a_true_equation_that_starts_where_the_last_one_ended() -> None:
    for problem in problems(500, seed=4):
        ended = None
        for left, sign, right, result in re.findall(r"(\d+) ([+*/-]) (\d+) = (\d+)\.", problem.text):
            assert OPERATIONS[sign](Fraction(left), Fraction(right)) == int(result)
            assert ended is None or left == ended
            ended = result
        assert problem.text.endswith(f"\n#### {ended}")


def test_problems_have_one_to_three_steps_and_all_four_operations() -> None:
    texts = [problem.text for problem in problems(300, seed=0)]
    assert {text.count("=") for text in texts} == {1, 2, 3}
    assert all(any(f" {sign} " in text for text in texts) for sign in OPERATIONS)


def test_a_seed_gives_the_same_problems_again_and_another_seed_others() -> None:
    assert list(problems(20, seed=1)) == list(problems(20, seed=1)) != list(problems(20, seed=2))
