"""What a server may try, phase by phase: the client refuses, and what would leak if it did not.

`strip` is the server's side of a successful attack: with both secrets of a client, or those of all its peers, it takes
every mask off its vector.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from msgspec.structs import replace
from numpy.typing import NDArray
from parties import BROADCAST, IDENTITIES, NAMES, PHASES, World

from atoll.errors import InvalidArgument
from atoll.secagg import Client, Identity, Mark, Member, Parameters, Policy, Roster, SecAggError, Server
from atoll.secagg import client as client_module
from atoll.secagg.client import Phase
from atoll.secagg.graph import threshold_of
from atoll.secagg.masks import add_masks
from atoll.secagg.messages import (
    Confirmations,
    Signed,
    Survivors,
    bits_of,
    masking_of,
    own_mask,
    pair_mask,
    seal_key,
    sealed_for,
)
from atoll.secagg.primitives import agree, unseal
from atoll.secagg.shamir import SHARE, combine


def strip(world: World, victim: str, seed: bytes, secrets: dict[int, bytes]) -> NDArray[Any]:
    """A client's vector, from its seed and the agreed secrets with all its peers."""
    place = world.names.index(victim)
    vector = np.frombuffer(world.sent[victim, "mask"].vector, dtype=world.vectors[victim].dtype).copy()
    told = world.told[victim, "mask"]
    masking = masking_of(told.session, told.dealt)
    keys = [(own_mask(masking, seed), -1)]
    keys += [(pair_mask(masking, s, place, p), -1 if place < p else 1) for p, s in secrets.items()]
    add_masks(vector, keys)
    return vector


def peers(world: World, name: str) -> dict[int, bytes]:
    """Mask keys of a client's peers, as it was told."""
    return {k.place: k.advert.mask_key for k in world.told[name, "share"].known}


def refuses(reason: str, client: Client, call: Callable[[], Any], *, alive: bool = False) -> None:
    """The call raises for this reason; the client gives up and forgets, unless the message did not concern it."""
    before = client.phase
    with pytest.raises(SecAggError) as caught:
        call()
    assert caught.value.reason == reason, caught.value
    if alive:
        assert client.phase is before
    else:
        assert client.phase is Phase.ABORTED
        assert client._secrets is None and not client._kept and not client._own_share


# --- one kind of share, once ------------------------------------------------------------------------------------------


def test_each_client_gives_one_share_of_each_dealer_and_only_once() -> None:
    world = World(4).until("mask")
    world.step(missing=[NAMES[3]])
    world.step()
    kept = {n: dict(world.clients[n]._kept) for n in NAMES[:3]}
    told = dict(world.due)
    world.step()
    for name in NAMES[:3]:
        held = world.sent[name, "unmask"].held
        assert [h.place for h in held] == [0, 1, 2, 3]
        own = NAMES.index(name)
        assert all(h.share == kept[name][h.place][h.place == 3] for h in held if h.place != own)
        # Asked again, with the same words: refused, and there is nothing left to give.
        client = world.clients[name]
        refuses("order", client, lambda c=client, m=told[name]: c.unmask(m), alive=True)
        assert client.phase is Phase.DONE and not client._kept and client._secrets is None


def test_both_kinds_would_show_the_vector() -> None:
    world = World(4).until("confirm")
    kept = {n: dict(world.clients[n]._kept) for n in world.names}
    victim = NAMES[0]
    seed = combine({world.names.index(n) + 1: kept[n][0][0] for n in NAMES[1:4]})
    key = combine({world.names.index(n) + 1: kept[n][0][1] for n in NAMES[1:4]})
    assert seed is not None and key is not None
    private = X25519PrivateKey.from_private_bytes(key)
    found = strip(world, victim, seed, {p: agree(private, k) for p, k in peers(world, victim).items()})
    assert np.array_equal(found, world.vectors[victim])
    # The clients give one kind: the set they signed decides which.
    world.run()
    assert all(len({h.place for h in m.held}) == len(m.held) for (_, p), m in world.sent.items() if p == "unmask")


@pytest.mark.parametrize("phase", PHASES)
def test_nothing_is_answered_twice(phase: str) -> None:
    world = World(3).until(phase)
    message = world.due[NAMES[0]]
    client = world.clients[NAMES[0]]
    world.answer(NAMES[0], message, phase)
    with pytest.raises(SecAggError) as caught:
        world.answer(NAMES[0], message, phase)
    assert caught.value.reason == "order" and client.phase is not Phase.ABORTED


def test_two_vectors_under_the_same_masks_would_show_their_difference() -> None:
    world = World(3).until("mask")
    client, delivery = world.clients[NAMES[0]], world.due[NAMES[0]]
    first = client.mask(delivery, world.vectors[NAMES[0]])
    other = world.vectors[NAMES[0]] + np.uint32(7)
    refuses("order", client, lambda: client.mask(delivery, other), alive=True)
    # The masks are additive: the same ones again would give the difference of the two vectors away.
    twin = World(3).until("mask")
    c = twin.clients[NAMES[0]]
    kept = c._secrets, c.phase
    a = np.frombuffer(c.mask(twin.due[NAMES[0]], world.vectors[NAMES[0]]).vector, dtype="<u4")
    c._secrets, c.phase = kept
    c._kept.clear()
    b = np.frombuffer(c.mask(twin.due[NAMES[0]], other).vector, dtype="<u4")
    assert (b - a == 7).all() and len(first.vector) == 16


# --- survivors --------------------------------------------------------------------------------------------------------


def test_different_survivors_for_different_clients() -> None:
    world = World(7).until("confirm")
    everyone = bits_of(range(7), 7)
    fewer = bits_of(range(6), 7)
    session = world.due[NAMES[0]].session
    shown = {n: everyone if i < 3 or i == 6 else fewer for i, n in enumerate(world.names)}
    signatures = {
        i: world.answer(n, Survivors(session, shown[n]), "confirm").signature for i, n in enumerate(world.names)
    }
    for i, name in enumerate(world.names):
        client = world.clients[name]
        others = tuple(Signed(p, s) for p, s in signatures.items() if p != i and not (i in (3, 4, 5) and p == 6))
        refuses("survivors", client, lambda c=client, o=others: c.unmask(Confirmations(session, o)))


def isolating(world: World, victim: str) -> dict[str, Survivors]:
    """A lie for each client: the victim's keepers hear that all survive, the others that its peers are gone."""
    session, count = world.due[victim].session, len(world.names)
    place, around = world.names.index(victim), set(peers(world, victim))
    keepers = {s.place for s in world.sent[victim, "share"].sealed}
    told: dict[str, Survivors] = {}
    for i, name in enumerate(world.names):
        alive = set(range(count)) if i in keepers or i == place else set(range(count)) - (around - {i})
        told[name] = Survivors(session, bits_of(alive, count))
    return told


def shares_given(world: World, told: dict[str, Survivors]) -> tuple[dict[tuple[int, str], dict[int, bytes]], int]:
    """Shares by (dealer, kind) that the clients give after these lies, and how many clients refuse."""
    signed: dict[int, bytes] = {}
    for i, name in enumerate(world.names):
        try:
            signed[i] = world.answer(name, told[name], "confirm").signature
        except SecAggError as error:  # a lie that a client sees through by itself
            assert error.reason == "few"
    given: dict[tuple[int, str], dict[int, bytes]] = {}
    refused = 0
    for i in signed:
        client, session = world.clients[world.names[i]], told[world.names[i]].session
        others = sorted(client._group & client._survivors - {i})
        confirmations = Confirmations(session, tuple(Signed(p, signed.get(p, bytes(64))) for p in others))
        try:
            answer = client.unmask(confirmations)
        except SecAggError as error:
            assert error.reason == "survivors"
            refused += 1
            continue
        for held in answer.held:
            kind = "seed" if held.place in client._survivors else "key"
            given.setdefault((held.place, kind), {})[i + 1] = held.share
    return given, refused


def feasible(world: World, victim: str, threshold: int) -> bool:
    """Whether the lie of `isolating` would go through with clients that ask for no signatures."""
    place, around = world.names.index(victim), set(peers(world, victim))
    keepers = {n: {s.place for s in world.sent[n, "share"].sealed} for n in world.names}
    misled = [keepers[world.names[p]] - keepers[victim] - {place} for p in around]
    views = [len((keepers[n] | {i}) - (around - {i})) for i, n in enumerate(world.names) if i not in keepers[victim]]
    return all(len(m) >= threshold for m in misled) and sum(v >= threshold for v in views) >= len(views) - 1


def test_a_victim_cannot_be_isolated_in_a_sparse_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every client sees a plausible set; only that a set counts if its group has signed it protects the victim."""
    over, policy = (1, 2), Policy(server="curious", risk=1.0)
    threshold = threshold_of(9, over)

    def world() -> tuple[World, str]:
        made = World(110, degree=8, over=over, policy=policy, length=3).until("confirm")
        return made, next(n for n in made.names if feasible(made, n, threshold))

    careful, victim = world()
    given, refused = shares_given(careful, isolating(careful, victim))
    assert refused and len(given.get((careful.names.index(victim), "seed"), {})) < threshold
    # What would leak if signatures were not checked: the victim's very vector.
    monkeypatch.setattr(client_module, "verified", lambda *_: True)
    careless, victim = world()
    given, refused = shares_given(careless, isolating(careless, victim))
    assert not refused
    seed = combine(dict(list(given[careless.names.index(victim), "seed"].items())[:threshold]))
    assert seed is not None
    public = careless.sent[victim, "join"].mask_key
    secrets: dict[int, bytes] = {}
    for peer in peers(careless, victim):
        raw = combine(dict(list(given[peer, "key"].items())[:threshold]))
        assert raw is not None
        secrets[peer] = agree(X25519PrivateKey.from_private_bytes(raw), public)
    assert np.array_equal(strip(careless, victim, seed, secrets), careless.vectors[victim])


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([1, 2, 3, 4], "survivors"),  # without itself
        ([0, 1, 2], "few"),  # below the threshold of four
        ([0], "few"),
        ([], "survivors"),
        ([0, 1, 2, 3, 5], "survivors"),  # somebody who dealt no shares
    ],
)
def test_survivors_that_cannot_be(places: list[int], reason: str) -> None:
    world = World(6).until("share")
    world.step(missing=[NAMES[5]])
    world.step()
    client, session = world.clients[NAMES[0]], world.due[NAMES[0]].session
    refuses(reason, client, lambda: client.confirm(Survivors(session, bits_of(places, 6))))


def test_signatures_that_do_not_count() -> None:
    for case in ("few", "twice", "own", "stranger", "dead", "forged", "other set"):
        world = World(5).until("mask")
        world.step(missing=[NAMES[4]])
        world.step()
        good: Confirmations = world.due[NAMES[0]]
        signed = good.signed
        if case == "few":
            signed = signed[:-1]
        elif case == "twice":
            signed = (*signed[:-1], signed[0])
        elif case in ("own", "stranger", "dead"):
            signed = (*signed[:-1], replace(signed[-1], place={"own": 0, "stranger": 9, "dead": 4}[case]))
        elif case == "forged":
            signed = (*signed[:-1], replace(signed[-1], signature=bytes(64)))
        else:
            text = client_module.messages.survivors_text(good.session, bits_of(range(5), 5), bits_of(range(5), 5))
            signature = IDENTITIES[NAMES[signed[-1].place]].key.sign(text)
            signed = (*signed[:-1], replace(signed[-1], signature=signature))
        client = world.clients[NAMES[0]]
        refuses("survivors", client, lambda c=client, g=good, s=signed: c.unmask(replace(g, signed=s)))


def test_different_dealers_for_different_clients() -> None:
    """Told that another set has dealt, a client masks under other keys: nothing cancels, and nothing leaks."""
    world = World(5).until("mask")
    lie = replace(world.due[NAMES[0]], dealt=bits_of(range(4), 5))
    lie = replace(lie, sealed=tuple(s for s in lie.sealed if s.place != 4))
    world.answer(NAMES[0], lie, "mask")
    for name in NAMES[1:5]:
        world.server.receive(name, world.answer(name, world.due[name], "mask"))
    world.server.receive(NAMES[0], world.sent[NAMES[0], "mask"])
    world.due = world.server.close()
    client = world.clients[NAMES[0]]
    refuses("survivors", client, lambda: client.confirm(world.due[NAMES[0]]))


# --- keys, graph ------------------------------------------------------------------------------------------------------


def test_substituted_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(4).until("share")
    fake = {p: X25519PrivateKey.generate() for p in range(1, 4)}
    neighbours = world.due[NAMES[0]]
    known = tuple(
        replace(k, advert=replace(k.advert, cipher_key=fake[k.place].public_key().public_bytes_raw()))
        for k in neighbours.known
    )
    lie = replace(neighbours, known=known)
    careless = world.clients[NAMES[0]]
    twin = World(4).until("share")
    refuses("signature", twin.clients[NAMES[0]], lambda: twin.clients[NAMES[0]].share(
        replace(lie, session=twin.due[NAMES[0]].session)
    ))  # fmt: skip
    # What would leak: the shares are sealed for the server, which opens both secrets and reads the vector.
    with monkeypatch.context() as patched:
        patched.setattr(Client, "_check_advert", lambda *_: None)
        shares = careless.share(lie)
    advert = world.sent[NAMES[0], "join"]
    texts: dict[int, bytes] = {}
    for sealed in shares.sealed:
        key = seal_key(shares.session, agree(fake[sealed.place], advert.cipher_key), 0, sealed.place)
        text = unseal(key, sealed.text, sealed_for(shares.session, 0, sealed.place, sealed.seed_hash, sealed.key_hash))
        assert text is not None
        texts[sealed.place + 1] = text
    seed, raw = (combine({x: t[a:b] for x, t in texts.items()}) for a, b in ((0, SHARE), (SHARE, 2 * SHARE)))
    assert seed is not None and raw is not None
    assert X25519PrivateKey.from_private_bytes(raw).public_key().public_bytes_raw() == advert.mask_key


@pytest.mark.parametrize("field", ["cipher_key", "mask_key", "commitment", "signature", "base"])
def test_a_changed_advert(field: str) -> None:
    world = World(3).until("share")
    neighbours = world.due[NAMES[0]]
    advert = neighbours.known[0].advert
    value = bytearray(getattr(advert, field))
    value[5] ^= 1
    changed = replace(neighbours.known[0], advert=replace(advert, **{field: bytes(value)}))
    client = world.clients[NAMES[0]]
    refuses("signature", client, lambda: client.share(replace(neighbours, known=(changed, *neighbours.known[1:]))))


def test_an_advert_signed_by_another_identity() -> None:
    """The server enters keys of its own in everybody's roll: those who are impersonated and those who check, see it."""
    world = World(3)
    for name in world.names:
        world.server.receive(name, world.answer(name, world.server.invitation, "join"))
    forger = Identity.new(NAMES[1])
    advert = world.sent[NAMES[1], "join"]
    forged = client_module.signed(
        forger, replace(advert, mask_key=X25519PrivateKey.generate().public_key().public_bytes_raw())
    )
    world.server._adverts[1] = forged
    roll = world.server.close()
    refuses("roster", world.clients[NAMES[1]], lambda: world.clients[NAMES[1]].reveal(roll[NAMES[1]]))
    for name in (NAMES[0], NAMES[2]):
        world.server.receive(name, world.clients[name].reveal(roll[name]))
    world.server._nonces[1] = bytes(32)
    neighbours = world.server.close()
    refuses("signature", world.clients[NAMES[0]], lambda: world.clients[NAMES[0]].share(neighbours[NAMES[0]]))


def test_neighbours_that_were_not_drawn_and_keepers_held_back() -> None:
    policy = Policy(risk=1.0, colluding=0.0)
    base = World(70, degree=10, policy=policy).until("share")
    neighbours = base.due[NAMES[0]]
    mine = set(client_module.graph.keepers(base.clients[NAMES[0]]._fresh.nonce, neighbours.session, 0, range(70), 10))
    dealers = [k for k in neighbours.known if k.nonce]
    stranger = next(i for i in range(1, 70) if i not in {k.place for k in neighbours.known})
    extra = replace(neighbours.known[0], place=stranger, advert=base.sent[NAMES[stranger], "join"], nonce=b"")
    drawn_not = replace(extra, nonce=base.clients[NAMES[stranger]]._fresh.nonce)
    lies = {
        "held back": tuple(k for k in neighbours.known if k.place != min(mine)),
        "not drawn": (*neighbours.known, extra),
        "nonce that drew others": (*neighbours.known, drawn_not),
        "wrong nonce": tuple(replace(k, nonce=bytes(32)) if k is dealers[0] else k for k in neighbours.known),
        "twice": (*neighbours.known, neighbours.known[0]),
        "itself": (*neighbours.known, replace(extra, place=0)),
    }
    client = base.clients[NAMES[0]]
    saved = client._secrets
    for known in lies.values():
        refuses("graph", client, lambda k=known: client.share(replace(neighbours, known=k)))
        client.phase, client._secrets = Phase.SHARE, saved
    client.share(neighbours)


def test_who_stays_away_changes_nobodys_keepers() -> None:
    """The server cannot steer the graph by saying who dropped out after it has seen the nonces."""
    policy = Policy(risk=1.0, colluding=0.0)
    world = World(70, degree=10, policy=policy).until("reveal")
    nonces = {n: world.clients[n]._fresh.nonce for n in world.names}
    world.step(missing=NAMES[40:45])
    world.step(missing=NAMES[45:48])
    for i, name in enumerate(world.names[:40]):
        due = client_module.graph.keepers(nonces[name], world.due[name].session, i, range(70), 10)
        assert tuple(s.place for s in world.sent[name, "share"].sealed) == due


def test_keys_of_small_order() -> None:
    world = World(3)
    lie = client_module.signed(
        IDENTITIES[NAMES[1]], replace(world.answer(NAMES[1], world.server.invitation, "join"), mask_key=bytes(32))
    )
    with pytest.raises(SecAggError) as caught:
        world.server.receive(NAMES[1], lie)
    assert caught.value.reason == "key" and caught.value.party == NAMES[1]


# --- another session, another model, a second time --------------------------------------------------------------------


@pytest.mark.parametrize("phase", PHASES[1:])
def test_messages_of_another_attempt(phase: str) -> None:
    world, other = World(3).until(phase), World(3, attempt=2).until(phase)
    client = world.clients[NAMES[0]]
    for name in (NAMES[0], NAMES[1]):
        with pytest.raises(SecAggError) as caught:
            world.answer(NAMES[0], other.due[name], phase)
        assert caught.value.reason == "order" and client.phase is Phase[phase.upper()]
    world.run()


def test_another_model_for_one_client() -> None:
    world = World(3)
    client = world.clients[NAMES[0]]
    refuses("broadcast", client, lambda: client.join(world.server.invitation, bytes(32)))
    # Told the hash of what it was really sent, it is in a session of its own.
    apart = World(3)
    lie = replace(apart.server.invitation, broadcast=bytes(32))
    advert = apart.clients[NAMES[0]].join(lie, bytes(32))
    with pytest.raises(SecAggError) as caught:
        apart.server.receive(NAMES[0], advert)
    assert caught.value.reason == "order"
    for name in NAMES[1:3]:
        apart.server.receive(name, apart.answer(name, apart.server.invitation, "join"))
    apart.server._adverts[0] = advert
    roll = apart.server.close()
    refuses("order", apart.clients[NAMES[0]], lambda: apart.clients[NAMES[0]].reveal(roll[NAMES[0]]), alive=True)
    for name in NAMES[1:3]:
        apart.server.receive(name, apart.answer(name, roll[name], "reveal"))
    apart.server._nonces[0] = bytes(32)
    neighbours = apart.server.close()
    refuses("signature", apart.clients[NAMES[1]], lambda: apart.clients[NAMES[1]].share(neighbours[NAMES[1]]))


def again(mark: Mark | None, policy: Policy | None = None, **asked: int) -> Client:
    world = World(3, **asked)
    client = Client(IDENTITIES[NAMES[0]], world.roster, policy, mark)
    client.join(world.server.invitation, BROADCAST)
    return client


def test_a_restarted_client_sits_the_attempt_out() -> None:
    world = World(3).until("mask")
    mark = world.clients[NAMES[0]].mark
    assert mark is not None and not mark.masked
    with pytest.raises(SecAggError, match="nothing is taken up twice"):
        again(mark)
    assert again(mark, attempt=2).phase is Phase.REVEAL


def test_an_older_round_is_refused() -> None:
    mark = again(None, round=5).mark
    for asked in ({"round": 4}, {"round": 4, "attempt": 9}, {"round": 5}):
        with pytest.raises(SecAggError) as caught:
            again(mark, **asked)
        assert caught.value.reason == "used"


def test_a_vector_is_not_sent_in_a_second_attempt() -> None:
    """A server that says an attempt failed which did not, and asks again without one client, would see that client."""
    first = World(5)
    total = first.run().total
    marks = {n: c.mark for n, c in first.clients.items()}
    for asked in ({"attempt": 2}, {"round": 1}):  # again for the same round, or for the same model
        with pytest.raises(SecAggError, match="see a single client"):
            again(marks[NAMES[0]], **asked)
        assert again(marks[NAMES[0]], Policy(again=True), **asked).phase is Phase.REVEAL
    second = World(5, attempt=2, policy=Policy(again=True))
    second.vectors = first.vectors
    left_out = second.run({NAMES[4]: "join"}).total
    assert np.array_equal(total - left_out, first.vectors[NAMES[4]])  # what would leak


def test_no_round_in_between_makes_a_client_forget_what_it_sent() -> None:
    """Asked for another model first, it would else give a second sum over the same model."""
    first = World(3)
    first.run()
    mark = first.clients[NAMES[0]].mark
    between = World(3, round=1)
    other = replace(between.server.invitation, broadcast=bytes(32))
    client = Client(IDENTITIES[NAMES[0]], between.roster, None, mark)
    client.join(other, bytes(32))
    with pytest.raises(SecAggError, match="see a single client"):
        again(client.mark, round=2)
    assert again(client.mark, Policy(again=True), round=2).phase is Phase.REVEAL


def test_sums_that_differ_by_one_client_are_warned_of() -> None:
    first = World(5)
    first.run()
    mark = first.clients[NAMES[0]].mark
    assert mark is not None and mark.survivors == NAMES[:5]
    second = World(5, round=1, policy=Policy(again=True))
    second.clients[NAMES[0]] = Client(IDENTITIES[NAMES[0]], second.roster, Policy(again=True), mark)
    second.run({NAMES[4]: "mask"})
    assert any("without c004" in w for w in second.clients[NAMES[0]].warnings)
    assert not any("without" in w for w in second.clients[NAMES[1]].warnings)


# --- policy and roster ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "asked", "said"),
    [
        (Policy(least=4), {}, "clients=3.*at least 4"),
        (Policy(length=3), {}, "length=4.*at most 3"),
        (Policy(bits=(24, 32)), {"bits": 16}, "bits=16.*24 to 32"),
        (Policy(bits=(24, 32)), {"bits": 40}, "bits=40"),
        (Policy(clip=(0.5, 2.0)), {"clip": 3.0}, "clip=3.0.*0.5 to 2.0"),
        (Policy(), {"clip": float("inf")}, "not finite"),
        (Policy(weight_cap=10.0), {"weight_cap": 11.0}, "weight_cap=11.0"),
        (Policy(attempts=3), {"attempt": 4}, "attempt=4.*at most 3"),
        (Policy(), {"over": (1, 2)}, "threshold=.1/2.*2/3.*lying"),
        (Policy(), {"over": (65, 100)}, "threshold=.65/100"),
        (Policy(), {"over": (1, 1)}, "threshold=.1/1"),
        (Policy(colluding=0.5), {}, "2 of 3 clients colluding"),
    ],
)  # fmt: skip
def test_what_is_out_of_policy(policy: Policy, asked: dict[str, Any], said: str) -> None:
    over = asked.pop("over", (2, 3))
    world = World(3, policy=policy, **asked)
    client, asks = world.clients[NAMES[0]], world.server.invitation
    with pytest.raises(SecAggError, match=said) as caught:
        client.join(replace(asks, parameters=replace(asks.parameters, threshold=over)), BROADCAST)
    assert caught.value.reason == "policy" and client.phase is Phase.ABORTED and client._secrets is None


def test_a_degree_that_is_too_small_for_the_cohort() -> None:
    names = tuple(sorted(NAMES))
    world = World(300, degree=16, policy=Policy())
    with pytest.raises(SecAggError, match=r"degree=16 and 15 of 300 clients colluding"):
        world.clients[names[0]].join(world.server.invitation, BROADCAST)
    world = World(300, degree=64, policy=Policy())
    world.clients[names[0]].join(world.server.invitation, BROADCAST)


def test_a_roll_of_too_few() -> None:
    world = World(6, policy=Policy(least=5))
    world.step(missing=NAMES[4:6])
    client = world.clients[NAMES[0]]
    refuses("few", client, lambda: client.reveal(world.due[NAMES[0]]))


def test_thresholds_with_a_server_that_is_only_curious() -> None:
    policy = Policy(server="curious")
    World(5, over=(1, 2), policy=policy).run()
    world = World(5, over=(3, 5), policy=policy)
    world.run()
    with pytest.raises(InvalidArgument, match="from 1/2 to below 1"):
        World(5, over=(49, 100), policy=policy)


@pytest.mark.parametrize("case", ["stranger", "without", "twice", "unsorted"])
def test_cohorts_that_are_no_cohort(case: str) -> None:
    world = World(4)
    cohort = {
        "stranger": (*NAMES[:4], "mallory"),
        "without": NAMES[1:4],
        "twice": (NAMES[0], *NAMES[:4]),
        "unsorted": (NAMES[1], NAMES[0], NAMES[2]),
    }[case]
    client = world.clients[NAMES[0]]
    refuses("roster", client, lambda: client.join(replace(world.server.invitation, cohort=cohort), BROADCAST))


def test_one_organisation_with_many_clients() -> None:
    members = [
        dataclasses.replace(IDENTITIES[n].member(), organisation="acme" if i < 3 else "")
        for i, n in enumerate(NAMES[:6])
    ]
    server = Server("run", 0, 1, Roster(members), NAMES[:6], Parameters(4), BROADCAST)
    client = Client(IDENTITIES[NAMES[5]], Roster(members))
    with pytest.raises(SecAggError, match="acme runs 3 of 6"):
        client.join(server.invitation, BROADCAST)
    Client(IDENTITIES[NAMES[5]], Roster(members), Policy(organisation=0.5)).join(server.invitation, BROADCAST)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([Member("a", bytes(32)), Member("a", b"\1" * 32)], "distinct names"),
        ([Member("a", bytes(32)), Member("b", bytes(32))], "distinct keys"),
        ([Member("", bytes(32))], "1 to 200 characters"),
        ([Member("a", bytes(31))], "32 bytes"),
    ],
)
def test_rosters_that_are_refused(members: Iterable[Member], said: str) -> None:
    with pytest.raises(InvalidArgument, match=said):
        Roster(members)


def test_a_roster_without_ones_own_key() -> None:
    with pytest.raises(SecAggError, match="own key is not in the roster"):
        Client(IDENTITIES[NAMES[0]], Roster([Identity.new(NAMES[0]).member()]))


@pytest.mark.parametrize("options", [{"least": 2}, {"server": "kind"}, {"colluding": 1.5}, {"risk": -1.0}])
def test_policies_that_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        Policy(**options)


def test_fewer_than_three_clients() -> None:
    with pytest.raises(InvalidArgument, match="at least 3 clients"):
        World(2)


def test_a_small_cohort_is_warned_of() -> None:
    assert again(None).warnings == ("a sum over 3 clients says much about each of them",)


# --- secrets stay secret ----------------------------------------------------------------------------------------------


def test_nothing_secret_is_shown() -> None:
    world = World(3).until("mask")
    client = world.clients[NAMES[0]]
    hidden = [client._fresh.nonce, client._fresh.seed, client._fresh.mask.private_bytes_raw(), client._own_share]
    shown = repr(client) + str(client) + repr(client._secrets) + repr(IDENTITIES[NAMES[0]]) + repr(world.server)
    shown += repr(world.sent) + repr(world.told)
    assert not any(h.hex() in shown or repr(h)[2:-1] in shown for h in hidden)
    world.run()
    assert client._secrets is None


def test_keys_are_fresh_in_every_attempt() -> None:
    first, second = World(3), World(3)
    first.step()
    second.step()
    for name in first.names:
        a, b = first.sent[name, "join"], second.sent[name, "join"]
        assert len({a.cipher_key, a.mask_key, a.commitment, b.cipher_key, b.mask_key, b.commitment}) == 6


def test_shares_swapped_between_dealers_are_not_taken() -> None:
    world = World(4).until("mask")
    delivery = world.due[NAMES[0]]
    a, b, c = delivery.sealed
    swapped = (replace(b, place=a.place), replace(a, place=b.place), c)
    world.server.receive(NAMES[0], world.answer(NAMES[0], replace(delivery, sealed=swapped), "mask"))
    assert world.clients[NAMES[0]]._unreadable == [1, 2] and list(world.clients[NAMES[0]]._kept) == [3]
    for name in NAMES[1:4]:
        world.server.receive(name, world.answer(name, world.due[name], "mask"))
    world.due, world.phase = world.server.close(), 4
    found = world.run()
    assert np.array_equal(found.total, world.total(world.names))
    assert set(found.culprits) == {NAMES[0]}, "who complains of two that nobody else complains of"
    assert f"could not read the shares of {NAMES[1]} (or the server" in found.culprits[NAMES[0]]


def test_a_late_vector_stays_masked() -> None:
    """What comes after the set was fixed is refused, and its own mask hides it: only its key was shown."""
    world = World(4).until("mask")
    late = world.answer(NAMES[3], world.due[NAMES[3]], "mask")
    world.step(missing=[NAMES[3]])
    with pytest.raises(SecAggError) as caught:
        world.server.receive(NAMES[3], late)
    assert caught.value.reason == "order"
    found = world.run()
    assert np.array_equal(found.total, world.total(NAMES[:3]))
    seeds = [h for n in NAMES[:3] for h in world.sent[n, "unmask"].held if h.place == 3]
    keys = {i + 1: h.share for i, h in enumerate(seeds)}
    raw = combine(keys)
    assert raw is not None
    private = X25519PrivateKey.from_private_bytes(raw)
    assert private.public_key().public_bytes_raw() == world.sent[NAMES[3], "join"].mask_key
    open_ = strip(world, NAMES[3], bytes(32), {p: agree(private, k) for p, k in peers(world, NAMES[3]).items()})
    assert not np.array_equal(open_, world.vectors[NAMES[3]])
