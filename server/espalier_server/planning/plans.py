"""Planning a window at the cloud: the participants of each round, their edges, and their levels."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from espalier.methods.base import CloudState, Inquiry, Method
from espalier.methods.planning import Member, Round, plan_window
from espalier.methods.selection import Answer, Selection
from espalier.wire import control
from espalier.wire.payload import Layout
from espalier.wire.sections import MODEL, Layouts, layouts_to_proto
from espalier_proto import espalier_pb2 as pb

Version = tuple[int, int]

#: Length of the random bytes that make each plan unique.
NONCE_BYTES = 16


@dataclass
class WindowDraw:
    """The participants of a window and their sub-models.

    Attributes
    ----------
    first_round : int
        Its first round.
    rounds : list[Round]
        Client -> edge, for each round.
    keeps : list[int]
        Number of a round's clients that train, if the edges select them; 0: all.
    keys : list[dict[str, str]]
        Client -> key of its view, for each round.
    views : dict[str, pb.View]
        The view of each key.
    """

    first_round: int = 0
    rounds: list[Round] = field(default_factory=list)
    keeps: list[int] = field(default_factory=list)
    keys: list[dict[str, str]] = field(default_factory=list)
    views: dict[str, pb.View] = field(default_factory=dict)

    @property
    def edges(self) -> list[str]:
        """The edges that have participants in the window."""
        return sorted({edge for assignment in self.rounds for edge in assignment.values()})


def draw_window(
    method: Method,
    selection: Selection,
    state: CloudState,
    members: Sequence[Member],
    ask: Inquiry,
) -> WindowDraw:
    """Draw the participants of the next window.

    Samplers that rank clients send an inquiry about the global model for the first round. In the further rounds of the
    window, the edges rank the candidates.

    Parameters
    ----------
    method : Method
        The algorithm.
    selection : Selection
        The sampler.
    state : CloudState
        The global state.
    members : sequence of Member
        Clients that can participate.
    ask : Inquiry
        Sends an inquiry about a network to clients.
    """
    s = method.settings
    first, count = state.round + 1, min(s.rg, s.rounds - state.round)
    candidates = selection.candidates(first, members)
    answers: dict[str, Answer] = {}
    if selection.probe and candidates:
        names = [m.name for m in candidates]
        # Each candidate evaluates the sub-model that it would train.
        keys = method.assign(state, names, {m.name: m for m in members}, first)
        answers = ask(selection.probe, state.architecture, state.payload, names, keys)
    picks, keeps = [selection.choose(first, candidates, answers)], [0]
    for round_ in range(first + 1, first + count):
        later, keep = selection.later(round_, members)
        picks.append(later)
        keeps.append(keep)
    by_name = {m.name: m for m in members}
    draw = WindowDraw(
        first,
        plan_window(
            picks,
            members,
            method.edge_choice(),
            first_round=first,
            seed=s.seed,
            # Which of two edges reaches a client first is random, and clients of any method may keep Adam's moments.
            sticky_edge=method.sticky_edge or s.reproducible,
        ),
        keeps,
        [method.assign(state, [m.name for m in p], by_name, first + i) for i, p in enumerate(picks)],
    )
    draw.views = {key: method.view(state, key) for keys in draw.keys for key in keys.values() if key}
    return draw


def window_plan(
    method: Method,
    state: CloudState,
    run: str,
    draw: WindowDraw,
    reached: Mapping[str, Version],
    checkpoint_window: int,
) -> pb.WindowPlan:
    """Return the window plan that is sent to all edges."""
    s, window, start = method.settings, state.window + 1, dict(reached)
    plan = pb.WindowPlan(
        schema=control.SCHEMA,
        run=run,
        window=window,
        settings=s.to_struct(),
        architecture=state.architecture,
        sections=layouts_to_proto(state.payload.layouts),
        checkpoint_window=checkpoint_window,
        round_deadline=s.round_deadline,
        quorum=s.quorum,
        population=state.population,
        peers=state.peers,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    for key, view in draw.views.items():
        plan.views[key].CopyFrom(view)
    for i, assignment in enumerate(draw.rounds):
        round_ = draw.first_round + i
        schedule = plan.rounds.add(round=round_, keep=draw.keeps[i])
        for client, edge in assignment.items():
            at = start.get(client, (0, 0))
            version = pb.Version(window=at[0], round=at[1])
            schedule.participants.add(
                client=client, edge=edge, start=version, view=draw.keys[i].get(client, "")
            )
            start[client] = (window, round_)
    return plan


def inquiry_plan(
    method: Method,
    state: CloudState,
    run: str,
    kind: str,
    architecture: pb.ArchitectureSpec,
    layouts: Layouts,
    assignment: Mapping[str, str],
    keys: Mapping[str, str],
    reached: Mapping[str, Version],
    checkpoint_window: int,
) -> pb.WindowPlan:
    """Return a plan with an inquiry, which is sent to all edges; `assignment` maps clients to edges."""
    s = method.settings
    plan = pb.WindowPlan(
        schema=control.SCHEMA,
        run=run,
        window=state.window + 1,
        settings=s.to_struct(),
        architecture=architecture,
        sections=layouts_to_proto(layouts or {MODEL: Layout(())}),
        checkpoint_window=checkpoint_window,
        round_deadline=s.round_deadline,
        population=state.population,
        inquiry=kind,
        nonce=secrets.token_bytes(NONCE_BYTES),
    )
    schedule = plan.rounds.add(round=state.round + 1)
    for client, edge in assignment.items():
        at = reached.get(client, (0, 0))
        version, key = pb.Version(window=at[0], round=at[1]), keys.get(client, "")
        schedule.participants.add(client=client, edge=edge, start=version, view=key)
        if key:
            plan.views[key].CopyFrom(method.view(state, key))
    return plan
