from dataclasses import fields, replace

from hypothesis import given
from hypothesis import strategies as st

from flops.manager.states import PAUSABLE, RETRIABLE, TERMINAL, Observation, State, next_state

observations = st.builds(Observation, **{field.name: st.booleans() for field in fields(Observation)})


@given(st.sampled_from(State), st.lists(observations))
def test_only_an_extension_or_a_retry_leaves_a_terminal_state(state: State, seen: list[Observation]) -> None:
    for observation in seen:
        following = next_state(state, observation)
        extended = state is State.FINISHED and observation.extended
        retried = state in RETRIABLE and observation.retry_requested
        assert state not in TERMINAL or following is (State.SUBMITTED if extended or retried else state)
        state = following


@given(st.sampled_from(State), observations)
def test_every_state_follows_the_drawn_arrows_only(state: State, seen: Observation) -> None:
    way = list(State)[:6]
    allowed = {state, State.FAILED, State.STOPPING} if state not in TERMINAL else {state}
    if state in way[:-1]:
        allowed.add(way[way.index(state) + 1])
    if state in PAUSABLE:
        allowed.add(State.PAUSING)
    if state in TERMINAL:  # more rounds, or another attempt
        allowed.add(State.SUBMITTED)
    if state is State.STOPPING:
        allowed = {state, State.STOPPED}
    if state is State.PAUSING:
        allowed = {state, State.PAUSED, State.STOPPING}
    if state is State.PAUSED:
        allowed = {state, State.SUBMITTED, State.STOPPING}
    assert next_state(state, seen) in allowed


@given(st.sampled_from(sorted(set(State) - TERMINAL)), st.lists(observations))
def test_a_stop_ends_in_stopped_whatever_else_is_seen(state: State, seen: list[Observation]) -> None:
    state = next_state(state, Observation(stop_requested=True, failed=True, trained=True))
    for observation in seen:
        state = next_state(state, replace(observation, retry_requested=False))
    assert next_state(state, Observation(services_gone=True)) is State.STOPPED


@given(st.sampled_from(sorted(PAUSABLE)), st.lists(observations))
def test_a_pause_neither_fails_nor_goes_on_until_it_is_resumed(state: State, seen: list[Observation]) -> None:
    state = next_state(state, Observation(pause_requested=True))
    for observation in seen:
        state = next_state(state, replace(observation, stop_requested=False, resume_requested=False))
    assert state in (State.PAUSING, State.PAUSED)
    paused = next_state(state, Observation(services_gone=True))
    assert paused is State.PAUSED
    assert next_state(paused, Observation(resume_requested=True)) is State.SUBMITTED


def test_a_project_that_only_goes_well_passes_every_state() -> None:
    everything = Observation(begun=True, prepared=True, deployed=True, trained=True, packaged=True)
    state, seen = State.SUBMITTED, [State.SUBMITTED]
    while state not in TERMINAL:
        state = next_state(state, everything)
        seen.append(state)
    assert seen == list(State)[:6]
