"""KL divergence of distributions that are given as logits."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def log_sum(logits: NDArray[np.floating]) -> tuple[NDArray[np.float64], NDArray[np.floating]]:
    """log sum exp of each row, and exp(row - its largest) in the precision of the logits."""
    largest = logits.max(-1, keepdims=True)
    weights = np.exp(logits - largest)
    return largest[:, 0] + np.log(weights.sum(-1, dtype=np.float64)), weights


def divergence(p: NDArray[np.floating], q: NDArray[np.floating]) -> NDArray[np.float64]:
    """KL divergence of q's distributions from p's, in nats: logits (n, vocabulary) -> (n,), exactly 0 for equal ones.

    Exponentials are taken in the precision of the logits; sums are of float64.
    """
    log_p, weights = log_sum(p)
    log_q, _ = log_sum(q)
    # KL = E_p[p's logit - q's logit] - (log sum exp of p's - that of q's).
    expected = np.einsum("ij,ij->i", weights, p - q, dtype=np.float64) / weights.sum(-1, dtype=np.float64)
    return np.maximum(expected - (log_p - log_q), 0)  # rounding can make it -1e-7
