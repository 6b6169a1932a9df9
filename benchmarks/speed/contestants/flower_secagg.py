"""Flower's SecAgg+ on given sizes: the stages of its own client, its own arithmetic at the server.

    python flower_secagg.py '[{"clients": 32, "length": 1000000, "dropped": 0.0, "degree": 64}]'

Prints the processor seconds of each case as JSON. Messages are handed over as the records its functions take.
"""

import importlib
import json
import sys
import time
from typing import Any

import numpy as np
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.ndarrays_arithmetic import (
    get_parameters_shape,
    parameters_addition,
    parameters_mod,
    parameters_subtraction,
)
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

MODULUS = 2**32

# The package has a function of the module's name.
client = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")


def attempt(clients: int, length: int, dropped: float, degree: int) -> float:
    """Processor seconds of one attempt; the sum of the quantised vectors is checked."""
    shares = min(clients, degree + 1)
    threshold = 2 * shares // 3 + 1
    around = {i: sorted({(i + j - shares // 2) % clients for j in range(shares)} | {i}) for i in range(clients)}
    asked = {
        Key.SAMPLE_NUMBER: clients, Key.SHARE_NUMBER: shares, Key.THRESHOLD: threshold, Key.CLIPPING_RANGE: 8.0,
        Key.TARGET_RANGE: 2**20, Key.MOD_RANGE: MODULUS, Key.MAX_WEIGHT: 1.0,
    }  # fmt: skip
    gone = set(range(0, clients, round(1 / dropped))) if dropped else set()
    began = time.process_time()
    states = {i: client.SecAggPlusState(nid=i) for i in range(clients)}
    keys: dict[int, tuple[Any, Any]] = {}
    for i, state in states.items():
        found: Any = client._setup(state, asked)
        keys[i] = (found[Key.PUBLIC_KEY_1], found[Key.PUBLIC_KEY_2])
    texts: dict[int, list[tuple[int, Any]]] = {i: [] for i in states}
    for i, state in states.items():
        found = client._share_keys(state, {str(j): keys[j] for j in around[i]})
        for to, text in zip(found[Key.DESTINATION_LIST], found[Key.CIPHERTEXT_LIST], strict=True):
            texts[to].append((i, text))
    total: Any = None
    vector = ndarrays_to_parameters([np.full(length, 0.5, dtype=np.float32)])
    for i, state in states.items():
        if i in gone:
            continue
        given = {Key.CIPHERTEXT_LIST: [t for _, t in texts[i]], Key.SOURCE_LIST: [s for s, _ in texts[i]]}
        found = client._collect_masked_vectors(state, given, 1, vector)
        masked = [bytes_to_ndarray(b) for b in found[Key.MASKED_PARAMETERS]]
        total = masked if total is None else parameters_addition(total, masked)
    total = parameters_mod(total, MODULUS)
    collected: dict[int, list[Any]] = {i: [] for i in states}
    for i, state in states.items():
        if i in gone:
            continue
        given = {
            Key.ACTIVE_NODE_ID_LIST: [j for j in around[i] if j not in gone],
            Key.DEAD_NODE_ID_LIST: [j for j in around[i] if j in gone],
        }
        found = client._unmask(state, given)
        for owner, share in zip(found[Key.NODE_ID_LIST], found[Key.SHARE_LIST], strict=True):
            collected[owner].append(share)
    shape = get_parameters_shape(total)
    for i, held in collected.items():
        secret = combine_shares(held)
        if i not in gone:
            total = parameters_subtraction(total, pseudo_rand_gen(secret, MODULUS, shape))
            continue
        for j in around[i]:
            if j == i or j in gone:
                continue
            key = generate_shared_key(bytes_to_private_key(secret), bytes_to_public_key(keys[j][0]))
            mask = pseudo_rand_gen(key, MODULUS, shape)
            total = parameters_addition(total, mask) if i > j else parameters_subtraction(total, mask)
    total = parameters_mod(total, MODULUS)
    seconds = time.process_time() - began
    # 0.5 of a range from -8 to 8 on a grid of 2^20, rounded at random; before it stands the weight, on the same grid.
    due = (clients - len(gone)) * (0.5 + 8.0) / 16.0 * 2**20
    if abs(float(total[-1].mean()) - due) > clients:
        raise RuntimeError(f"the sum is {total[-1].mean()}, not {due}")
    return seconds


if __name__ == "__main__":
    print(json.dumps([{"seconds": attempt(**case)} for case in json.loads(sys.argv[1])]))
