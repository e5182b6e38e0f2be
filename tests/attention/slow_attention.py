"""
A slow twin of the reference: one row at a time, in plain Python numbers, with nothing of torch or of the package.

Alignment is counted from the ends of a document, and Philox works on whole integers, so that neither shares a formula
with what it checks.
"""

import math
from typing import Any


def philox_words(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as in the paper: ten rounds, the key raised between them."""
    x = list(counter)
    for r in range(10):
        k0, k1 = ((key[0] + r * 0x9E3779B9) % 2**32, (key[1] + r * 0xBB67AE85) % 2**32)
        first, second = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [second // 2**32 ^ x[1] ^ k0, second % 2**32, first // 2**32 ^ x[3] ^ k1, first % 2**32]
    return tuple(x)


def is_kept(dropout_p: float, seed: int, b: int, h: int, i: int, j: int) -> bool:
    words = philox_words((j // 4, i, h, b), (seed % 2**32, seed // 2**32))
    return words[j % 4] >= int(dropout_p * 2**32)


def sees(
    i: int, j: int, lengths: list[tuple[int, int]], is_causal: bool, window: tuple[int | None, int | None]
) -> bool:
    """Whether query i sees key j, for documents of these lengths."""
    for num_queries, num_keys in lengths:
        if 0 <= i < num_queries:
            if not 0 <= j < num_keys:
                return False
            # Both counted back from the last of the document, which are at one place.
            steps_back = (num_keys - 1 - j) - (num_queries - 1 - i)
            is_late = is_causal and steps_back < 0
            is_too_far_left = window[0] is not None and steps_back > window[0]
            is_too_far_right = window[1] is not None and -steps_back > window[1]
            return not (is_late or is_too_far_left or is_too_far_right)
        i, j = i - num_queries, j - num_keys
    raise AssertionError("a query in no document")


def slow_row(a: dict[str, Any], lengths: list[tuple[int, int]], b: int, h: int, i: int) -> tuple[list[float], float]:
    """Output and logsumexp of one query; `a` has nested lists for tensors, and broadcast ones as they are."""
    query, keys, values = a["query"][b][h][i], *(a[name][b] for name in ("key", "value"))
    kv_head = h // (len(a["query"][b]) // len(keys))
    keys, values = keys[kv_head], values[kv_head]
    scale = len(query) ** -0.5 if a["scale"] is None else a["scale"]
    scores = {}
    for j, key in enumerate(keys):
        if not sees(i, j, lengths, a["is_causal"], a["window"]) or not pick(a.get("mask"), b, h, i, j, default=True):
            continue
        score = scale * math.fsum(x * y for x, y in zip(query, key, strict=True))
        if a["softcap"] is not None:
            score = a["softcap"] * math.tanh(score / a["softcap"])
        scores[j] = score + pick(a.get("bias"), b, h, i, j, default=0.0)
    logits = list(scores.values()) + ([a["sinks"][h]] if a.get("sinks") is not None else [])
    if not logits:
        return [0.0] * len(query), -math.inf
    largest = max(logits)
    logsumexp = largest + math.log(math.fsum(math.exp(logit - largest) for logit in logits))
    weights = {j: math.exp(score - logsumexp) for j, score in scores.items()}
    if (p := a.get("dropout_p", 0.0)) > 0:
        weights = {j: w / (1 - p) for j, w in weights.items() if is_kept(p, a["dropout_seed"], b, h, i, j)}
    return [math.fsum(w * values[j][d] for j, w in weights.items()) for d in range(len(query))], logsumexp


def pick(array: Any, b: int, h: int, i: int, j: int, default: Any) -> Any:
    """An element of nested lists, of which a dimension of length 1 stands for all."""
    for index in (b, h, i, j):
        if array is None:
            return default
        array = array[index if len(array) > 1 else 0]
    return array
