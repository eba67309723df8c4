"""What SGLang answers (0.5.23), parsed and checked: lengths agree, numbers are finite, ids are in range, versions cover every token."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from miles_core.errors import DataError, InfrastructureFailure, RunError

from .shape import ModelShape


class Malformed(ValueError):
    """An answer that cannot be right; says what is wrong with it."""


@dataclass(frozen=True)
class Generated:
    """What one request gave; the columns are those of ``Generation``."""

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish: Literal["stop", "length", "abort"]
    routing: np.ndarray | None
    support: list[list[int]] | None


@dataclass(frozen=True)
class ServerInfo:
    """What a server says of itself.

    Attributes:
        release: Of SGLang, such as ``0.5.23``.
        version: Of its weights; ``default`` where nobody set one.
        dtype: Of its weights, such as ``float32``; ``auto`` where that was left to the model.
        max_length: A context must be shorter than this, and a context with what is generated after it no longer.
        records_routing: Whether it was started so that it can return routed experts.
        ranks: Tensor-parallel ranks; each gets the weights.
        layout: How its weights are cut, in words.
        directory: What it was started from, on its machine: a directory, or a name on a hub.
        architectures: Of its model, as its config names them; empty where that names none.
    """

    release: str
    version: str
    dtype: str
    max_length: int
    records_routing: bool
    ranks: int
    layout: str
    directory: Path
    architectures: tuple[str, ...]


def read_info(model: dict[str, Any], server: dict[str, Any]) -> ServerInfo:
    """From ``/model_info`` and ``/server_info``."""
    # The server keeps some positions for itself: contexts must be shorter than max_req_input_len, all of it 4 tokens longer.
    return ServerInfo(
        release=str(server["version"]),
        version=str(model["weight_version"]),
        dtype=str(server["dtype"]).removeprefix("torch."),
        max_length=int(server["max_req_input_len"]),
        records_routing=bool(server["enable_return_routed_experts"]),
        ranks=int(server["tp_size"]),
        layout=", ".join(f"{what} {int(server[what])}" for what in ("tp_size", "pp_size", "ep_size")),
        directory=Path(server["model_path"]),
        architectures=tuple(str(name) for name in model["architectures"] or ()),
    )


def read_generated(
    answer: dict[str, Any], model: ModelShape, context: int, max_tokens: int, routing_start: int, restricted: bool
) -> Generated:
    """From ``/generate``.

    Args:
        answer: Parsed JSON.
        model: What the model is like.
        context: T, tokens that were sent.
        max_tokens: Most that were asked for.
        routing_start: First routing row that was asked for.
        restricted: Whether the support was asked for.

    Raises:
        Malformed, KeyError, TypeError, ValueError: The answer lacks something or contradicts itself.
        DataError, InfrastructureFailure, RunError: The server ended the request because of a fault, of the request, its own or the model's.
    """
    meta = answer["meta_info"]
    finish = _finish(meta["finish_reason"])
    tokens = np.array(answer["output_ids"], dtype=np.int64).reshape(-1)
    n = len(tokens)
    if n > max_tokens or (n == 0 and finish != "abort"):
        raise Malformed(f"{n} tokens where 1 to {max_tokens} were asked for")
    outside = np.flatnonzero((tokens < 0) | (tokens >= model.vocab_size))
    if len(outside):
        raise Malformed(f"token {tokens[outside[0]]} at {outside[0]} of its output is outside the vocabulary of {model.vocab_size}")
    return Generated(
        tokens=tokens.astype(np.int32),
        logprobs=_logprobs(meta, tokens, restricted),
        versions=_versions(meta["weight_versions"] if n else [], n),
        finish=finish,
        routing=_routing(meta, model, context + n - 1 - routing_start) if model.moe_layers and n else None,
        support=_support(meta, tokens) if restricted and n else None,
    )


def _finish(reason: dict[str, Any]) -> Literal["stop", "length", "abort"]:
    kind, status = reason["type"], reason.get("status_code")
    if kind == "abort" and status is not None:
        message = f"the server ended a generation: {reason.get('message')} (status {status})"
        raise DataError(message) if 400 <= int(status) < 500 else InfrastructureFailure(message)
    if kind == "stop" and isinstance(reason.get("matched"), str) and reason["matched"].startswith("NaN happened"):
        raise RunError("the policy's logits are not finite (NaN or infinity): its weights have diverged. Lower the learning rate.")
    if kind not in ("stop", "length", "abort"):
        raise Malformed(f"finish reason {kind!r}")
    return kind


def _logprobs(meta: dict[str, Any], tokens: np.ndarray, restricted: bool) -> np.ndarray:
    """float32 [n]. Where the support was restricted those over what was left of it, elsewhere over the vocabulary."""
    listed = meta["output_token_logprobs"] if len(tokens) else []
    if len(listed) != len(tokens) or any(entry[1] != token for entry, token in zip(listed, tokens.tolist(), strict=True)):
        raise Malformed(f"log-probabilities of {len(listed)} tokens, which are not the {len(tokens)} of its output")
    values = [entry[0] for entry in listed]
    if restricted and len(tokens):
        values = meta["output_token_sampling_logprobs"]
    logprobs = np.array(values, dtype=np.float32).reshape(-1)
    if len(logprobs) != len(tokens) or not np.isfinite(logprobs).all() or (logprobs > 1e-3).any():
        raise Malformed(f"log-probabilities that are missing, not finite or above 0 ({logprobs[:8]} …)")
    return np.minimum(logprobs, 0)


def _support(meta: dict[str, Any], tokens: np.ndarray) -> list[list[int]]:
    """The ids that each token could be drawn from, in rising order."""
    masks = meta["output_token_sampling_mask"]
    if len(masks) != len(tokens):
        raise Malformed(f"{len(masks)} supports of {len(tokens)} tokens")
    support = [sorted(int(i) for i in mask) for mask in masks]
    if strange := [i for i, (ids, token) in enumerate(zip(support, tokens.tolist(), strict=True)) if token not in ids]:
        raise Malformed(f"token {tokens[strange[0]]} at {strange[0]} of its output, which is not in its own support")
    return support


def _versions(spans: list[dict[str, Any]], n: int) -> np.ndarray:
    """int32 [n] from spans that must cover 0 to n in order."""
    versions = np.full(n, -1, np.int32)
    end = 0
    for span in spans:
        if span["start"] != end or span["end"] < end or not str(span["version"]).isdecimal():
            raise Malformed(f"weight versions {spans}, which do not cover its {n} tokens with numbers")
        end = span["end"]
        versions[span["start"] : end] = int(span["version"])
    if end != n:
        raise Malformed(f"weight versions up to token {end} of {n}")
    return versions


def _routing(meta: dict[str, Any], model: ModelShape, rows: int) -> np.ndarray:
    """uint8 / uint16 [rows, L, K] of the layers that have experts; the server gives all layers as int32."""
    raw = np.frombuffer(base64.b64decode(meta["routed_experts"], validate=True), dtype="<i4")
    if raw.size != rows * model.layers * model.top_k:
        raise Malformed(f"{raw.size} routed experts, not those of {rows} tokens, {model.layers} layers and {model.top_k} experts a token")
    routing = raw.reshape(rows, model.layers, model.top_k)[:, list(model.moe_layers)]
    if rows and (routing.min() < 0 or routing.max() >= model.experts):
        raise Malformed(f"a routed expert {routing.min()} or {routing.max()} of {model.experts}")
    return routing.astype(model.routing_dtype)


def read_scores(answer: dict[str, Any], tokens: np.ndarray) -> np.ndarray:
    """From ``/generate`` of 0 tokens: float32 [T], NaN for the first."""
    listed = answer["meta_info"]["input_token_logprobs"]
    if [entry[1] for entry in listed] != tokens.tolist():
        raise Malformed(f"log-probabilities of {len(listed)} tokens, which are not the {len(tokens)} that were sent")
    scores = np.array([np.nan, *(entry[0] for entry in listed[1:])], dtype=np.float32)
    if not np.isfinite(scores[1:]).all():
        raise Malformed("log-probabilities that are not finite")
    return scores


def read_checksum(answer: dict[str, Any]) -> tuple[str, dict[str, str]]:
    """From ``/weights_checker``: a digest over every rank's parameters by name, and by name those of the first rank that has it."""
    parts = [(rank, name, digest) for rank, held in enumerate(answer["ranks"]) for name, digest in sorted(held["checksums"].items())]
    if not parts:
        raise Malformed("no checksum of any parameter")
    digest = hashlib.blake2b("|".join(f"{rank} {name} {value}" for rank, name, value in parts).encode(), digest_size=16).hexdigest()
    return digest, {name: value for _, name, value in reversed(parts)}
