"""How tokens are cut into chunks whose logits are in memory at a time: standard library only, for planners too."""

from __future__ import annotations

ROOM = 1 << 29  # bytes of a chunk's logits on a GPU
SHARED_ROOM = 5 * (1 << 28)  # or of these and the gradient of all hidden states, where that leaves more


def tokens_of_a_chunk(tokens: int, hidden_bytes: int, logits_bytes: int, room: int | None = None) -> int:
    """How many of `tokens` have logits at a time, a multiple of 256 and chunks alike; bytes are of one token.

    Their logits take `room` bytes; None: those of a GPU. Each chunk reads and writes the weight's gradient once.
    """
    room = max(ROOM, SHARED_ROOM - hidden_bytes * tokens) if room is None else room
    most = max(1, room // logits_bytes)
    most = most // 256 * 256 or most
    chunks = -(-max(1, tokens) // most)
    return min(most, -(-tokens // chunks // 256) * 256 or 256)
