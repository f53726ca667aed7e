"""The built-in task: its language, and the exact quality of an answer."""

import random

import task

# Ann is drawn in the docstring of task.py; Ben turns right, left, right
PEOPLE = {"Ann": ("north", ["left", "left", "back"]), "Ben": ("west", ["right", "left", "right"])}
PERFECT = "Now Ann north: west south north. Ben north: north west north."


def test_the_examples_of_the_docstring_are_right():
    assert task.tell(task.solve(PEOPLE)) == PERFECT
    for text in (task.ask(PEOPLE), PERFECT):
        assert text in task.__doc__


def test_what_is_told_can_be_read():
    assert task.read(task.ask(PEOPLE)) == PEOPLE
    assert task.read(PERFECT) == task.solve(PEOPLE)
    assert task.read("Ann looks north, and Ben: nowhere") == {}


def test_questions_ask_three_people_to_turn_three_or_four_times():
    rng = random.Random(0)
    drawn = [task.draw_people(rng) for _ in range(40)]
    assert {len(people) for people in drawn} == {3}
    ways = [turns for people in drawn for _, turns in people.values()]
    assert {len(turns) for turns in ways} == {3, 4}
    assert {turn for turns in ways for turn in turns} == set(task.TURNS)
    assert {start for people in drawn for start, _ in people.values()} == set(task.LOOKS)


def test_each_kind_of_flaw_spoils_what_its_name_says():
    lines = task.solve(PEOPLE)
    rng = random.Random(0)

    def spoilt(kind):
        drawn = [task.spoil(lines, 1, rng, kinds=(kind,)) for _ in range(40)]
        return [one for one in drawn if one != lines]

    for one in spoilt("end"):
        assert [way for _, way in one.values()] == [way for _, way in lines.values()]
    for one in spoilt("turn"):
        assert [len(way) for _, way in one.values()] == [3, 3]
        assert [end for end, _ in one.values()] == ["north", "north"]
    assert all(sorted(len(way) for _, way in one.values()) == [2, 3] for one in spoilt("short"))
    assert all(len(one) == 1 for one in spoilt("forget"))
    assert lines == task.solve(PEOPLE)  # spoilt are copies
    # nothing is left without a line, however many flaws there are
    assert all(task.spoil(lines, 30, rng) for _ in range(20))
