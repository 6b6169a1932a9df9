"""Secure aggregation: the server learns the sum of the clients' vectors and nothing else.

Clients may drop out in any phase, and the server itself may lie.

Six answers of every client (`client`), six phases of the server (`server`), both pure state machines on the records of
`messages`. Identities are Ed25519 keys in a pinned roster (`policy`), keys are fresh for every attempt, masks are
ChaCha20 streams in a ring of 2^32 or 2^64 (`masks`), secrets that a dropped client leaves behind are shared (`shamir`)
among keepers that it drew itself (`graph`). docs/security.md says what is guaranteed against whom, and why.
"""

from atoll.secagg.client import Client
from atoll.secagg.encoding import Scale
from atoll.secagg.faults import SecAggError, Void
from atoll.secagg.messages import Invitation, Parameters, decode_client, decode_server, encode
from atoll.secagg.policy import Identity, Mark, Member, Policy, Roster
from atoll.secagg.server import Server, Sum

__all__ = [
    "Client",
    "Identity",
    "Invitation",
    "Mark",
    "Member",
    "Parameters",
    "Policy",
    "Roster",
    "Scale",
    "SecAggError",
    "Server",
    "Sum",
    "Void",
    "decode_client",
    "decode_server",
    "encode",
]
