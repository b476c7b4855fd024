from __future__ import annotations

import json
import math

import pytest

from sgopd.config import Config
from sgopd.phases import Phases


@pytest.fixture
def phases(settings):
    def make(**changes):
        return Phases(Config.load(None, settings(cold_start_steps=10, teacher_share=0.6, **changes)))

    return make


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", {0: 0.6, 5: 0.3, 9: 0.06}),
        ("cosine", {0: 0.6, 5: 0.3, 9: 0.3 * (1 + math.cos(0.9 * math.pi))}),
        ("constant", {0: 0.6, 5: 0.6, 9: 0.6}),
    ],
)
def test_share_falls_to_zero(phases, schedule, expected):
    phase = phases(teacher_share_schedule=schedule)
    for step, share in expected.items():
        assert phase.share(step) == pytest.approx(share)
    assert phase.share(10) == phase.share(1000) == 0.0


def test_no_cold_start_no_teacher(settings):
    phase = Phases(Config.load(None, settings()))
    assert phase.share(0) == 0.0
    assert phase.slots(0, 50, seed=0) == [0] * 50


@pytest.mark.parametrize(("generations", "step"), [(1, 0), (1, 5), (4, 0), (4, 3), (8, 9)])
def test_slots_are_the_share_in_expectation_and_nearly_so_in_every_batch(phases, generations, step):
    phase = phases(num_generations=generations)
    groups, per_group = 16, phase.share(step) * generations
    seen = [0] * groups
    draws = 2000
    for seed in range(draws):
        slots = phase.slots(step, groups, seed)
        assert abs(sum(slots) - groups * per_group) < 1
        assert all(math.floor(per_group) <= count <= math.ceil(per_group) for count in slots)
        seen = [total + count for total, count in zip(seen, slots)]
    for total in seen:  # every group alike: a standard error is at most 0.5 / sqrt(2000) = 0.011
        assert total / draws == pytest.approx(per_group, abs=0.05)


def test_whole_shares_are_exact(settings):
    phase = Phases(Config.load(None, settings(cold_start_steps=1, teacher_share=1.0, num_generations=8)))
    assert phase.slots(0, 9, seed=0) == [8] * 9


def test_reliability_is_the_endorsed_share_of_the_probes(phases):
    phase = phases()
    assert phase.reliability(3) == 0.0
    phase.record([(3, 1, True), (3, -1, True), (3, 1, False), (4, -1, True)])
    phase.record([(3, 0, False), (4, 0, True), (5, 0, False)])  # without a verdict they say nothing
    assert phase.reliability(3) == pytest.approx(2 / 3)
    assert phase.reliability(4) == 0.0
    assert (phase.proposed, phase.endorsed) == (4, 1) and phase.probes.keys() == {3, 4}


def test_state_survives_json(phases):
    phase, other = phases(), phases()
    phase.record([(3, 1, True), (5, -1, True)])
    other.load_state_dict(json.loads(json.dumps(phase.state_dict())))
    assert other.state_dict() == phase.state_dict()
    assert other.reliability(3) == 1.0
    other.record([(3, -1, True)])
    assert other.reliability(3) == 0.5 and phase.reliability(3) == 1.0
