"""Packed rows → what a Hugging Face model takes, and where each row's hidden state is found afterwards."""

from __future__ import annotations

import numpy as np

from miles_core.batch import Batch

Layout = tuple[dict[str, np.ndarray], np.ndarray]
"""Keyword arguments of the model, and int64 [N]: index of each packed row in the flattened [B · T] hidden states."""


def padded(batch: Batch) -> Layout:
    """[S, longest], padded on the right, with a boolean mask of the real tokens. Needs ``tokens`` and ``positions``."""
    longest = int(batch.lengths.max())
    where = batch.segment * longest + batch.array("positions")
    tokens, real = np.zeros((len(batch), longest), np.int64), np.zeros((len(batch), longest), bool)
    tokens.flat[where], real.flat[where] = batch.array("tokens"), True
    return {"input_ids": tokens, "attention_mask": real}, where


def packed(batch: Batch) -> Layout:
    """One row [1, N]; positions start over with each sample.

    Without an attention mask, transformers takes the restarts for sample boundaries: it builds a causal block-diagonal mask
    for sdpa and eager attention (within the window where a layer has one), cumulative lengths for flash attention.
    """
    tokens, positions = batch.array("tokens")[None].astype(np.int64), batch.array("positions")[None].astype(np.int64)
    return {"input_ids": tokens, "position_ids": positions}, np.arange(batch.n_rows)


LAYOUTS = {"padded": padded, "packed": packed}
