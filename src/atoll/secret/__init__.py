"""Randomness that privacy rests on: noise, secret samples and keys, from a cryptographic source.

Experiments are seeded (`atoll.random`), privacy is not: whoever knows a seed can subtract the noise. A `Source` is a
ChaCha20 stream keyed by the operating system, with exact samplers on top of it. `Source(seed=...)` is the same machine
for tests; it says of itself that it is not private.
"""

from atoll.secret.source import Source, grid, keystream

__all__ = ["Source", "grid", "keystream"]
