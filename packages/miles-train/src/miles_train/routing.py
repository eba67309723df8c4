"""The routing column in a trainer: which rows have recorded experts to replay, and what must hold before they are used (DESIGN §5, R3).

Row p of a packed batch's ``routing`` are the experts that token p took as an INPUT: the column is not rolled. They shaped the prediction
made at row p, so that the rolled columns ``versions`` and ``loss_mask`` say at the same row p whether that prediction was sampled
and is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from miles_core.batch import Batch
from miles_core.errors import DataError

REMEDY = "Give rollout engine and trainer the same model, or set routing_replay: false"


@dataclass(frozen=True)
class MoeShape:
    """What a model's routing looks like.

    Attributes:
        layers: L, MoE layers of the whole model.
        k: K, experts that a token takes in each.
        experts: E, experts there are in each.
    """

    layers: int
    k: int
    experts: int


def load_routing(batch: Batch, shape: MoeShape) -> Batch:
    """The batch with its column ``routing``, once everything holds that replay relies on. Rows without a record are allowed where the
    token predicted there is not trained or nobody sampled it (prompts, SFT): routers choose for themselves there.

    Raises:
        DataError: A sample's routing is not [T, L, K] of this model, names an expert twice or one that does not exist, is recorded in part
            of the layers only, or is missing at a row whose predicted token was sampled and is trained. Names sample and token.
    """
    for ref in batch.refs:
        column = ref.get().columns.get("routing")
        if isinstance(column, np.ndarray) and column.shape[1:] != (shape.layers, shape.k):
            layers, k = column.shape[1:]
            raise DataError(
                f"sample {ref.id} has routing of {layers} MoE layers with {k} experts each; the model has {shape.layers} such layers and "
                f"takes {shape.k} experts in each. {REMEDY}"
            )
    batch = batch.load(("routing",))
    routing = batch.array("routing")
    missing = routing == np.iinfo(routing.dtype).max
    known = recorded(batch)
    _refuse(batch, ~known & ~missing.all((1, 2)), "has experts recorded in some MoE layers and not in others")
    _refuse(batch, known & (routing >= shape.experts).any((1, 2)), f"took an expert that does not exist; the model has {shape.experts}")
    twice = np.zeros(batch.n_rows, bool)
    for i, j in combinations(range(routing.shape[2]), 2):
        twice |= (routing[..., i] == routing[..., j]).any(1)
    _refuse(batch, known & twice, "took the same expert twice in one MoE layer")
    needed = batch.array("loss_mask") & (batch.array("versions") >= 0)
    if batch.owners is not None:  # what branches share is trained where it is owned
        needed &= batch.owners == np.arange(batch.n_rows)
    _refuse(
        batch,
        needed & ~known,
        "has no routing recorded, though the token after it was sampled and is trained",
        "Let the rollout engine record routing, or set routing_replay: false",
    )
    return batch


def recorded(batch: Batch) -> np.ndarray:
    """bool [N]: the row's experts were recorded, in every MoE layer."""
    routing = batch.array("routing")
    if 0 in routing.shape[1:]:  # no sample has any
        return np.zeros(batch.n_rows, bool)
    return (routing != np.iinfo(routing.dtype).max).all((1, 2))


def experts_to_replay(batch: Batch) -> np.ndarray | None:
    """int64 [N, L, K]: the experts to take at each row, −1 where the routers choose for themselves; None if they do everywhere.

    Args:
        batch: With ``load_routing``'s column, or a part of it (micro-batch, shard).
    """
    known = recorded(batch)
    if not known.any():
        return None
    return np.where(known[:, None, None], batch.array("routing").astype(np.int64), -1)


def routing_metrics(differs: float, replayed: float, rows: float) -> dict[str, float]:
    """``routing/replayed``: share of rows whose experts were replayed; ``routing/differs``: share of the replayed (row, layer) pairs where
    the router's own top-k would have been other experts (left out when nothing was replayed).

    Args:
        differs, replayed, rows: Counts of (row, MoE layer) pairs in training forward passes, padding left out.
    """
    metrics = {"routing/replayed": replayed / rows} if rows else {}
    return metrics | ({"routing/differs": differs / replayed} if replayed else {})


def own_routing(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a forward pass without replay, told apart: of ``mismatch/…`` those as ``mismatch_own_routing/…``, others left out."""
    return {n.replace("mismatch/", "mismatch_own_routing/"): x for n, x in metrics.items() if n.startswith("mismatch/")}


def _refuse(batch: Batch, bad: np.ndarray, what: str, remedy: str = REMEDY) -> None:
    """Raise a DataError for the first row of bool [N] ``bad``."""
    if bad.any():
        row = int(bad.argmax())
        sample = int(batch.segment[row])
        token = row - int(batch.cu_seqlens[sample])
        raise DataError(f"sample {batch.refs[sample].id}: token {token} {what}. {remedy}")
