"""What a client may send: the server refuses it and goes on, or names it; the sum is never wrong in silence."""

from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace
from parties import NAMES, PHASES, World

from atoll.secagg import SecAggError, Void
from atoll.secagg import client as client_module
from atoll.secagg.messages import Held, Masked


def finish(world: World) -> None:
    """The rest of the attempt, and the sum."""
    found = world.run()
    assert np.array_equal(found.total, world.total(found.survivors))


@pytest.mark.parametrize("phase", PHASES)
def test_strangers_repeats_and_other_phases(phase: str) -> None:
    world = World(4).until(phase)
    answers = {n: world.answer(n, world.due[n], phase) for n in world.names}
    world.server.receive(NAMES[0], answers[NAMES[0]])
    earlier = world.sent.get((NAMES[1], PHASES[max(PHASES.index(phase) - 1, 0)]))
    wrong: list[tuple[str, Any]] = [(NAMES[0], answers[NAMES[0]]), ("stranger", answers[NAMES[1]])]
    if phase != "join":
        wrong.append((NAMES[1], earlier))
        wrong.append((NAMES[1], replace(answers[NAMES[1]], session=bytes(32))))
    for name, message in wrong:
        with pytest.raises(SecAggError) as caught:
            world.server.receive(name, message)
        assert caught.value.reason == "order"
    assert world.server.awaited == NAMES[1:4]
    for name in NAMES[1:4]:
        world.server.receive(name, answers[name])
    world.due, world.phase = world.server.close(), world.phase + 1
    finish(world)


def changed(raw: bytes) -> bytes:
    return bytes([raw[0] ^ 1]) + raw[1:]


@pytest.mark.parametrize(
    ("phase", "change", "reason"),
    [
        ("join", lambda m: replace(m, mask_key=changed(m.mask_key)), "signature"),
        ("join", lambda m: replace(m, signature=bytes(64)), "signature"),
        ("reveal", lambda m: replace(m, nonce=changed(m.nonce)), "graph"),
        ("share", lambda m: replace(m, sealed=m.sealed[:-1]), "graph"),
        ("share", lambda m: replace(m, sealed=(*m.sealed, m.sealed[0])), "graph"),
        ("mask", lambda m: replace(m, vector=m.vector[:-1]), "input"),
        ("mask", lambda m: replace(m, vector=m.vector + b"\0"), "input"),
        ("confirm", lambda m: replace(m, signature=bytes(64)), "survivors"),
    ],
)  # fmt: skip
def test_wrong_answers_change_nothing(phase: str, change: Any, reason: str) -> None:
    world = World(4).until(phase)
    answers = {n: world.answer(n, world.due[n], phase) for n in world.names}
    with pytest.raises(SecAggError) as caught:
        world.server.receive(NAMES[2], change(answers[NAMES[2]]))
    assert caught.value.reason == reason and caught.value.party == NAMES[2]
    for name, answer in answers.items():
        world.server.receive(name, answer)
    world.due, world.phase = world.server.close(), world.phase + 1
    finish(world)


@pytest.mark.parametrize("gone", [(), (NAMES[5],)])
def test_wrong_shares_are_left_out_and_told(gone: tuple[str, ...]) -> None:
    world = World(7).until("mask")
    world.step(missing=gone)
    world.step()
    for name in world.due:
        answer = world.answer(name, world.due[name], "unmask")
        if name == NAMES[2]:
            answer = replace(answer, held=tuple(Held(h.place, changed(h.share)) for h in answer.held))
        world.server.receive(name, answer)
    world.server.close()
    found = world.server.result
    assert np.array_equal(found.total, world.total(found.survivors))
    assert set(found.culprits) == {NAMES[2]} and "not the one it was dealt" in found.culprits[NAMES[2]]


def test_shares_that_nobody_asked_for() -> None:
    world = World(4).until("unmask")
    for name in world.due:
        answer = world.answer(name, world.due[name], "unmask")
        extra = (Held(9000, bytes(33)),) if name == NAMES[1] else ()
        world.server.receive(name, replace(answer, held=answer.held + extra, unreadable=(77,) if extra else ()))
    world.server.close()
    assert np.array_equal(world.server.result.total, world.total(world.names))


@pytest.mark.parametrize("survives", [True, False])
def test_a_dealer_whose_shares_do_not_fit_together(survives: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All its shares are what it committed to, but not of its secret: it is named, and the attempt is void."""
    world = World(5).until("share")
    honest = client_module.shamir.split
    for name in world.names:
        with monkeypatch.context() as patched:
            if name == NAMES[1]:
                patched.setattr(client_module.shamir, "split", lambda s, t, p: honest(bytes([7]) * 32, t, p))
            world.server.receive(name, world.answer(name, world.due[name], "share"))
    world.due, world.phase = world.server.close(), 3
    with pytest.raises(Void) as caught:
        world.run({} if survives else {NAMES[1]: "mask"})
    assert caught.value.reason == "dealer" and set(caught.value.culprits) == {NAMES[1]}


def test_a_dealer_that_nobody_can_read() -> None:
    world = World(5).until("share")
    for name in world.names:
        answer = world.answer(name, world.due[name], "share")
        if name == NAMES[1]:
            answer = replace(answer, sealed=tuple(replace(s, text=bytes(82)) for s in answer.sealed))
        world.server.receive(name, answer)
    world.due, world.phase = world.server.close(), 3
    with pytest.raises(Void) as caught:
        world.run()
    assert set(caught.value.culprits) == {NAMES[1]} and "could not read" in caught.value.culprits[NAMES[1]]


@pytest.mark.parametrize(
    ("blamed", "named"),
    [(NAMES[:2], NAMES[2:3]), (NAMES[:1], (NAMES[0], NAMES[2])), ((), NAMES[2:3])],
    ids=["everybody", "one", "silence"],
)
def test_a_keeper_that_blames_others_does_not_get_off(blamed: tuple[str, ...], named: tuple[str, ...]) -> None:
    """It keeps what it could give, and so makes the attempt void: a new one is not made without the others alone."""
    world = World(3).until("unmask")
    for name in world.names:
        answer = world.answer(name, world.due[name], "unmask")
        if name == NAMES[2]:
            answer = replace(answer, held=(), unreadable=tuple(NAMES.index(b) for b in blamed))
        world.server.receive(name, answer)
    with pytest.raises(Void) as caught:
        world.server.close()
    assert set(caught.value.culprits) == set(named)


def test_vectors_of_other_numbers() -> None:
    world = World(3).until("mask")
    client = world.clients[NAMES[0]]
    for vector in (np.zeros(5, "<u4"), np.zeros(4, "<u8"), np.zeros(4, "<f4"), np.zeros((2, 2), "<u4")):
        with pytest.raises(SecAggError) as caught:
            client.mask(world.due[NAMES[0]], vector)
        assert caught.value.reason == "input"
    finish(world)  # it was the caller's mistake: the attempt goes on


def test_a_server_that_is_done_or_void() -> None:
    world = World(3)
    with pytest.raises(SecAggError, match="has no sum yet"):
        _ = world.server.result
    world.run()
    for call in (world.server.close, lambda: world.server.receive(NAMES[0], Masked(bytes(32), b""))):
        with pytest.raises(SecAggError) as caught:
            call()
        assert caught.value.reason == "order"
