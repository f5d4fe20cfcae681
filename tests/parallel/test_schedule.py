"""Schedules: complete, free of deadlock, and exactly as short and as small as their papers say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import UserError
from engine.parallel.schedule import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    build_schedule,
    forward_only,
    interleaved,
    one_f_one_b,
    place_of,
    stage_of,
)
from engine.parallel.simulator import Deadlock, Timeline, check, needs, simulate

STAGES = st.integers(1, 8)
MICROBATCHES = st.integers(1, 24)
VIRTUAL = st.integers(1, 4)
CHUNKS = st.integers(2, 4)  # interleaving needs two
TIMES = st.integers(1, 5)  # whole numbers, so that sums of times are exact


def text(schedule: Schedule) -> list[str]:
    """Each rank's actions, readable."""
    return [" ".join(map(str, actions)) for actions in schedule]


def actions(line: str) -> list[Action]:
    """The inverse of `text` for one rank."""
    found = []
    for word in line.split():
        micro, _, chunk = word[1:].partition(".")
        found.append(Action(Kind(word[0]), int(micro), int(chunk or 0)))
    return found


def training_schedule(stages: int, virtual: int, microbatches: int) -> Schedule:
    return build_schedule("1f1b" if virtual == 1 else "interleaved", stages, virtual, microbatches)


def assert_dependencies_kept(timeline: Timeline, stages: int, virtual: int, send_time: float) -> None:
    """Ranks do one thing at a time, and nothing starts before what it needs has ended and arrived."""
    end = {(rank, span.action): span.end for rank, spans in enumerate(timeline.spans) for span in spans}
    for rank, spans in enumerate(timeline.spans):
        assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
        for span in spans:
            for source, needed in needs(span.action, rank, stages, stages * virtual - 1):
                assert end[source, needed] + send_time * (source != rank) <= span.start


def test_1f1b_of_four_stages_is_spelled_out() -> None:
    assert text(one_f_one_b(4, 1, 5)) == [
        "F0 F1 F2 F3 B0 F4 B1 B2 B3 B4",
        "F0 F1 F2 B0 F3 B1 F4 B2 B3 B4",
        "F0 F1 B0 F2 B1 F3 B2 F4 B3 B4",
        "F0 B0 F1 B1 F2 B2 F3 B3 F4 B4",
    ]


def test_interleaved_of_two_stages_is_spelled_out() -> None:
    assert text(interleaved(2, 2, 4)) == [
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
    ]


def test_interleaved_with_a_missing_microbatch_is_the_full_order_without_it() -> None:
    assert text(interleaved(2, 2, 3)) == [
        "F0 F1 F0.1 F1.1 F2 B0.1 B1.1 F2.1 B0 B1 B2.1 B2",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 B1 F2.1 B2.1 B2",
    ]


def test_forward_only_runs_each_group_through_the_chunks() -> None:
    assert text(forward_only(2, 1, 3)) == ["F0 F1 F2"] * 2
    assert text(forward_only(2, 2, 3)) == ["F0 F1 F0.1 F1.1 F2 F2.1"] * 2


@given(STAGES, VIRTUAL, MICROBATCHES, st.integers(0, 2), st.data())
@settings(max_examples=150, deadline=None)
def test_training_schedules_are_complete_and_never_deadlock(
    stages: int, virtual: int, microbatches: int, send_time: int, data: st.DataObject
) -> None:
    schedule = training_schedule(stages, virtual, microbatches)
    check(schedule, stages, virtual, microbatches)
    per_stage = st.lists(TIMES, min_size=stages * virtual, max_size=stages * virtual)
    timeline = simulate(schedule, data.draw(per_stage), data.draw(per_stage), send_time)
    assert [[span.action for span in spans] for spans in timeline.spans] == schedule
    assert_dependencies_kept(timeline, stages, virtual, send_time)


@given(STAGES, VIRTUAL, MICROBATCHES)
@settings(max_examples=100, deadline=None)
def test_evaluation_schedules_are_complete_and_never_deadlock(stages: int, virtual: int, microbatches: int) -> None:
    schedule = forward_only(stages, virtual, microbatches)
    check(schedule, stages, virtual, microbatches, forward_only=True)
    assert_dependencies_kept(simulate(schedule), stages, virtual, 0)


@given(STAGES, MICROBATCHES, TIMES, TIMES)
@settings(max_examples=150, deadline=None)
def test_1f1b_has_the_bubble_and_the_memory_of_its_paper(
    stages: int, microbatches: int, forward: int, backward: int
) -> None:
    timeline = simulate(one_f_one_b(stages, 1, microbatches), forward, backward)
    assert timeline.makespan == (microbatches + stages - 1) * (forward + backward)
    assert timeline.bubble == pytest.approx((stages - 1) / (microbatches + stages - 1), abs=1e-12)
    assert timeline.peak_activations == tuple(min(microbatches, stages - rank) for rank in range(stages))


@given(STAGES, CHUNKS, st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_interleaving_divides_the_bubble_by_the_number_of_chunks(stages: int, virtual: int, groups: int) -> None:
    microbatches = groups * stages
    chunked = simulate(interleaved(stages, virtual, microbatches), 1, 2)
    ideal = microbatches * virtual * 3
    assert chunked.makespan - ideal == (stages - 1) * 3  # (stages - 1) / (virtual * microbatches) of the ideal time
    plain = simulate(one_f_one_b(stages, 1, microbatches), virtual, 2 * virtual)
    assert chunked.bubble < plain.bubble if stages > 1 else chunked.bubble == plain.bubble == 0


@given(STAGES, CHUNKS, MICROBATCHES)
@settings(max_examples=100, deadline=None)
def test_interleaved_is_never_slower_than_1f1b(stages: int, virtual: int, microbatches: int) -> None:
    chunked = simulate(interleaved(stages, virtual, microbatches), 1, 2)
    assert chunked.makespan <= simulate(one_f_one_b(stages, 1, microbatches), virtual, 2 * virtual).makespan


@given(STAGES, CHUNKS, MICROBATCHES)
@settings(max_examples=100, deadline=None)
def test_striking_out_missing_microbatches_needs_no_more_memory(stages: int, virtual: int, microbatches: int) -> None:
    filled = simulate(interleaved(stages, virtual, -(-microbatches // stages) * stages)).peak_activations
    struck = simulate(interleaved(stages, virtual, microbatches)).peak_activations
    assert all(peak <= bound for peak, bound in zip(struck, filled, strict=True))


@given(STAGES, VIRTUAL, MICROBATCHES)
@settings(max_examples=100, deadline=None)
def test_results_of_a_kind_are_used_in_the_order_in_which_they_are_sent(
    stages: int, virtual: int, microbatches: int
) -> None:
    schedule = training_schedule(stages, virtual, microbatches)
    place = [{action: index for index, action in enumerate(rank)} for rank in schedule]
    received: dict[tuple[int, int, Kind], list[int]] = {}
    for rank, action in ((rank, action) for rank, order in enumerate(schedule) for action in order):
        for source, needed in needs(action, rank, stages, stages * virtual - 1):
            if source != rank:
                received.setdefault((source, rank, needed.kind), []).append(place[source][needed])
    assert all(order == sorted(order) for order in received.values())


@given(STAGES, st.integers(0, 31))
def test_place_of_is_the_inverse_of_stage_of(stages: int, stage: int) -> None:
    rank, chunk = place_of(stage, stages)
    assert 0 <= rank < stages
    assert stage_of(rank, chunk, stages) == stage


def test_one_stage_alone_is_never_idle_and_needs_no_messages() -> None:
    assert text(one_f_one_b(1, 1, 2)) == ["F0 B0 F1 B1"]
    assert simulate(interleaved(1, 3, 4), send_time=100).bubble == 0


def test_sending_takes_time_between_ranks_only() -> None:
    assert simulate(one_f_one_b(3, 1, 1), 1, 2, send_time=0.5).makespan == 3 * 3 + 4 * 0.5


def test_a_deadlock_names_what_every_stuck_rank_waits_for() -> None:
    broken = [actions("F0 B0 F1 B1"), actions("F0 F1 B0 B1")]
    with pytest.raises(Deadlock) as caught:
        simulate(broken)
    assert str(caught.value) == "deadlock: rank 0 at B0 waits for B0 of rank 1; rank 1 at F1 waits for F1 of rank 0"
    assert caught.value.stuck[0] == (Action(Kind.B, 0), 1, Action(Kind.B, 0))


def test_a_deadlock_says_when_the_awaited_action_is_nowhere() -> None:
    with pytest.raises(Deadlock, match="^deadlock: rank 1 at F1 waits for F1 of rank 0, which rank 0 never runs$"):
        simulate([actions("F0 B0"), actions("F0 B0 F1 B1")])


def test_two_ranks_that_wait_for_the_same_action_are_both_named() -> None:
    with pytest.raises(Deadlock) as caught:
        simulate([actions("F0 B0"), actions("B0 F0"), actions("F0 B0")])
    assert sorted(caught.value.stuck) == [0, 1, 2]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("F0 B0 F1", "rank 1: missing B1; repeated or foreign none"),
        ("F0 B0 F1 B1 B1", "rank 1: missing none; repeated or foreign B1"),
        ("F0 B0 F1.1 B1.1", "rank 1: missing F1 B1; repeated or foreign F1.1 B1.1"),
        ("F0 B0 F2 B2", "rank 1: missing F1 B1; repeated or foreign F2 B2"),
    ],
)
def test_check_names_missing_repeated_and_foreign_actions(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^schedule of {message}$"):
        check([actions("F0 F1 B0 B1"), actions(line)], 2, 1, 2)


def test_check_counts_ranks_and_shortens_long_lists() -> None:
    with pytest.raises(ValueError, match="schedule has 2 ranks, the pipeline has 3"):
        check(one_f_one_b(2, 1, 4), 3, 1, 4)
    with pytest.raises(ValueError, match="missing F0 F1 F2 F3 F4 F5 F6 F7 and 32 more; "):
        check([[], []], 2, 1, 20)


def test_times_must_cover_every_global_stage() -> None:
    with pytest.raises(ValueError, match="3 times given for 4 global stages"):
        simulate(interleaved(2, 2, 2), forward_time=[1, 2, 3])


def test_the_drawing_is_one_line_per_rank() -> None:
    assert str(simulate(one_f_one_b(2, 1, 3))).splitlines() == [
        "rank 0  F0 F1 ......B0--- F2 B1--- ...B2---",
        "rank 1  ...F0 B0--- F1 B1--- F2 B2--- ......",
        "makespan 12, bubble 25.0%, peak activations 2 1",
    ]


def test_a_wide_drawing_stays_narrow_enough_to_look_at() -> None:
    lines = str(simulate(interleaved(8, 4, 64))).splitlines()
    assert len(lines) == 9
    assert max(map(len, lines)) <= 330


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interleave", 2, 2, 4), "unknown schedule 'interleave'; did you mean interleaved? use --schedule 1f1b or "),
        (("gpipe", 2, 1, 4), "unknown schedule 'gpipe'; use --schedule 1f1b or interleaved"),
        (("1f1b", 2, 2, 4), "1f1b runs one chunk of layers per rank, not 2; use --virtual-stages 1, or --schedule int"),
        (("interleaved", 2, 1, 4), "two or more chunks of layers per rank, not 1; use --virtual-stages 2, or --sch"),
        (("1f1b", 0, 1, 4), "pipeline stages must be 1 or more, not 0"),
        (("1f1b", 2, 1, 0), "micro-batches must be 1 or more, not 0"),
    ],
)
def test_impossible_schedules_are_refused_in_plain_words(arguments: tuple[str, int, int, int], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_schedule(*arguments)
    assert message in str(caught.value)


def test_schedules_and_actions_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        SCHEDULES["mine"] = one_f_one_b  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Action(Kind.F, 0).micro = 1  # type: ignore[misc]
