"""What can go wrong in secure aggregation, by reason."""

from typing import Literal

from atoll.errors import AtollError

Reason = Literal[
    "order",  # a message that does not belong here: late, early, repeated, or of another session
    "message",  # bytes that are not the message that was expected
    "policy",  # the server asks for what this client does not allow
    "roster",  # identities that are missing, duplicated or unknown
    "broadcast",  # a model or task that is not the one the server says it sent
    "used",  # an attempt this client has taken part in already, or one before it
    "signature",  # what does not come from whom it claims to come from
    "key",  # a public key that gives no secret
    "graph",  # neighbours that do not follow from the committed nonces
    "survivors",  # a set of survivors that is too small, contradictory or not agreed upon
    "input",  # a vector that does not fit the parameters
    "few",  # too few clients are left
    "dealer",  # a client whose shares do not give what it committed to
    "share",  # a share that is not the one that was committed to
]
"""Why something was refused."""


class SecAggError(AtollError, RuntimeError):
    """Something in secure aggregation was refused.

    Attributes:
        reason: one of `Reason`.
        party: the client it is about; None: the server, or nobody in particular.
    """

    def __init__(self, reason: Reason, text: str, party: str | None = None) -> None:
        super().__init__(text)
        self.reason: Reason = reason
        self.party = party


class Void(SecAggError):
    """The attempt cannot give a sum any more; nothing was revealed. A new attempt needs fresh keys.

    Attributes:
        culprits: clients whose messages were wrong, and how; a new attempt may leave them out.
    """

    def __init__(self, reason: Reason, text: str, culprits: dict[str, str]) -> None:
        super().__init__(reason, text)
        self.culprits = culprits
