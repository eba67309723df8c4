"""The client of one SGLang server: typed calls, and answers that are checked before anyone believes them."""

from __future__ import annotations

import asyncio
import json
import re
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx
import numpy as np

from miles_core.errors import ConfigError, DataError, InfrastructureFailure, MilesError, RunError
from miles_core.protocols import SamplingParams

from .answers import Generated, Malformed, ServerInfo, read_checksum, read_generated, read_info, read_scores
from .payload import Bucket, Request
from .shape import ModelShape

TRIES = 3
"""Of calls that may be repeated: a hiccup of a server must not end a run."""
PAUSE_SECONDS = 0.2
"""Between two of them, times their number."""
IDLE_SECONDS = 2.0
"""For an idle connection to be given up; the server does so after five."""

ABORT_SECONDS = 5.0
"""For an abort to be taken: somebody who gave up a generation waits for it."""

EXCERPT = 400
"""Characters of an answer that an error shows."""


class Silence(InfrastructureFailure):
    """A server did not answer within the deadline."""


@dataclass(frozen=True)
class Deadlines:
    """Seconds until a server that does not answer counts as gone: a whole generation, and anything else."""

    generate_s: float
    control_s: float


class SglangClient:
    """Calls of one server. Made and used in one event loop; any number of calls at a time.

    Every call raises, with the server, the call and what can be said of its log in the message:
        InfrastructureFailure: The server cannot be reached, breaks off, is silent past the deadline, fails (HTTP 5xx) or answers what
            cannot be true (no JSON, wrong lengths, ids out of range).
        ConfigError: It does not take the key, or has no such endpoint.
    and beside these what the call itself names.
    """

    def __init__(self, name: str, url: str, key: str | None, model: ModelShape, deadlines: Deadlines, log: Callable[[], str]) -> None:
        """Nothing is sent yet.

        Args:
            name: Of the server, for messages.
            url: ``http://host:port``.
            key: Sent with every call; None where the server wants none.
            model: What its answers are checked against.
            deadlines: For its answers.
            log: Says what is known of its log, at the moment of an error.
        """
        self.name, self.url = name, url
        self._model, self._deadlines, self.log = model, deadlines, log
        self._http = httpx.AsyncClient(
            base_url=url,
            headers={} if key is None else {"Authorization": f"Bearer {key}"},
            timeout=None,  # each call has a deadline of its own
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=IDLE_SECONDS),
            trust_env=False,  # no proxy between us and our server
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # ---- generation ---------------------------------------------------------------------------------------------------

    async def generate(
        self, tokens: np.ndarray, sampling: SamplingParams, max_tokens: int, *, routing_start: int = 0, end_of_text: tuple[int, ...] = ()
    ) -> Generated:
        """Sample up to ``max_tokens`` after ``tokens``. Cancelling it aborts the request on the server.

        Args:
            tokens: int32 [T].
            sampling: ``max_tokens`` there is not looked at.
            max_tokens: Most tokens to generate.
            routing_start: First routing row wanted.
            end_of_text: Ids that end a generation, beside those of ``sampling`` and those the server knows.

        Raises:
            DataError: An id is outside the vocabulary (it would kill the server, so it is never sent), or the server refuses the request.
            RunError: The model's logits are not finite.
        """
        self._check_ids(tokens)
        request_id = uuid.uuid4().hex  # of one width: an abort takes every request whose id begins with the one it names
        restricted = sampling.temperature > 0 and (sampling.top_p < 1 or sampling.top_k > 0 or sampling.min_p > 0)
        body = {
            "rid": request_id,
            "input_ids": tokens.tolist(),
            "sampling_params": {
                "max_new_tokens": max_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                # Supports are recorded only where there is a top_k; one of the whole vocabulary restricts nothing.
                "top_k": min(sampling.top_k, self._model.vocab_size) or (self._model.vocab_size if restricted else -1),
                "min_p": sampling.min_p,
                "stop_regex": [re.escape(text) for text in sampling.stop],  # `stop` would be tokenised, which not every tokenizer can
                "stop_token_ids": sorted({*sampling.stop_token_ids, *end_of_text}),
                "no_stop_trim": True,
                "skip_special_tokens": False,
            },
            "return_logprob": True,
            "return_sampling_mask": restricted,
        }
        if self._model.moe_layers:
            body |= {"return_routed_experts": True, "routed_experts_start_len": routing_start}
        try:
            answer = await self._call("POST", "/generate", body, seconds=self._deadlines.generate_s, refusal=DataError)
        except (asyncio.CancelledError, InfrastructureFailure):
            await self._give_up(request_id)
            raise
        return self._read(lambda: read_generated(answer, self._model, len(tokens), max_tokens, routing_start, restricted), "/generate")

    async def score(self, tokens: np.ndarray) -> np.ndarray:
        """float32 [T]: log-probability of each token given those before it, at temperature 1; NaN for the first.

        Raises:
            DataError: As for ``generate``.
        """
        self._check_ids(tokens)
        body = {
            "rid": uuid.uuid4().hex,
            "input_ids": tokens.tolist(),
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._call("POST", "/generate", body, seconds=self._deadlines.generate_s, refusal=DataError)
        return self._read(lambda: read_scores(answer, tokens), "/generate (scoring)")

    async def abort(self, request_id: str | None = None) -> None:
        """End requests whose id begins with ``request_id``, None: all. They return what they have, which may be nothing."""
        body = {"abort_all": True} if request_id is None else {"rid": request_id}
        await self._repeated("POST", "/abort_request", body, json_answer=False)

    async def pause(self, mode: Literal["abort", "retract", "in_place"]) -> None:
        """Sample nothing more: ``retract`` sends running requests back to the queue, their context is run again afterwards."""
        await self._repeated("POST", "/pause_generation", {"mode": mode})

    async def continue_(self) -> None:
        """After ``pause``."""
        await self._repeated("POST", "/continue_generation", {})

    def _check_ids(self, tokens: np.ndarray) -> None:
        if len(tokens) == 0:
            raise DataError(f"not sent to {self.name}: the context is empty")
        outside = np.flatnonzero((tokens < 0) | (tokens >= self._model.vocab_size))
        if len(outside):
            what = f"token {tokens[outside[0]]} at index {outside[0]} is outside the vocabulary of {self._model.vocab_size}"
            raise DataError(f"not sent to {self.name}: {what}")

    async def _give_up(self, request_id: str) -> None:
        """Nobody waits for this request any more. If the server does not hear it, it is going away anyway."""
        aborting = asyncio.ensure_future(
            self._call("POST", "/abort_request", {"rid": request_id}, seconds=ABORT_SECONDS, json_answer=False)
        )
        aborting.add_done_callback(lambda task: task.cancelled() or task.exception())  # looked at, lest asyncio complain
        await asyncio.wait({aborting})

    # ---- weights ------------------------------------------------------------------------------------------------------

    async def begin_update(self) -> None:
        """Before the first bucket. Raises RunError if an update is open."""
        await self._call("POST", "/begin_weight_update", {"selector": "all"}, success=True)

    async def update_bucket(self, request: Request, ranks: int) -> None:
        """Weights for a server of so many ranks. Raises RunError if it refuses them."""
        await self._call("POST", "/update_weights_from_tensor", request.pieces(ranks), length=request.length(ranks), success=True)

    async def join_group(self, group: str, host: str, port: int, size: int, seconds: float) -> None:
        """Have its ranks meet in a process group of ``size``, as those from 1 on. Raises RunError if it refuses."""
        meeting = {"master_address": host, "master_port": port, "rank_offset": 1, "world_size": size, "backend": "gloo"}
        await self._call("POST", "/init_weights_update_group", meeting | {"group_name": group}, seconds=seconds, success=True)

    async def update_from_group(self, group: str, bucket: Bucket, seconds: float) -> None:
        """Have its ranks take a bucket from the group, and load it. Raises RunError if it refuses."""
        body = {
            "names": [entry.name for entry in bucket.entries],
            "dtypes": [str(entry.dtype).removeprefix("torch.") for entry in bucket.entries],
            "shapes": [list(entry.shape) for entry in bucket.entries],
            "group_name": group,
            "load_format": "flattened_bucket",
            "flush_cache": True,
        }
        await self._call("POST", "/update_weights_from_distributed", body, seconds=seconds, success=True)

    async def leave_group(self, group: str, seconds: float) -> None:
        """Have its ranks forget a group. Raises RunError if it has none of that name."""
        await self._call("POST", "/destroy_weights_update_group", {"group_name": group}, seconds=seconds, success=True)

    async def end_update(self) -> None:
        """After the last bucket. Raises RunError if no update is open."""
        await self._call("POST", "/end_weight_update", {}, success=True)

    async def set_version(self, version: int) -> None:
        """What tokens are stamped with from here on."""
        await self._repeated("POST", "/update_weight_version", {"new_version": str(version), "abort_all_requests": False}, success=True)

    async def load_from_disk(self, directory: Path) -> None:
        """Weights from a Hugging Face directory that the server can read. Raises RunError if it refuses or cannot."""
        body = {"model_path": str(directory), "flush_cache": True}
        await self._repeated("POST", "/update_weights_from_disk", body, success=True)

    async def checksum(self) -> tuple[str, dict[str, str]]:
        """Digest of the parameters it holds, fused and sharded as they are, and by name those of the first rank that has it."""
        answer = await self._repeated("POST", "/weights_checker", {"action": "checksum"}, success=True)
        return self._read(lambda: read_checksum(answer), "/weights_checker")

    # ---- what it is ---------------------------------------------------------------------------------------------------

    async def info(self) -> ServerInfo:
        """Its release, what it serves and in which version, and how long sequences may be."""
        model, server = await self._repeated("GET", "/model_info"), await self._repeated("GET", "/server_info")
        return self._read(lambda: read_info(model, server), "/model_info and /server_info")

    async def version(self) -> str:
        """The weight version it says it serves; "default" where nobody set one."""
        answer = await self._repeated("GET", "/model_info")
        return self._read(lambda: str(answer["weight_version"]), "/model_info")

    async def alive(self, seconds: float | None = None) -> bool:
        """Whether the server answers within the deadline, and its scheduler was heard of. Generates nothing."""
        try:
            await self._call("GET", "/v1/loads", seconds=seconds)
        except (InfrastructureFailure, MilesError):
            return False
        return True

    # ---- one call -----------------------------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | AsyncIterator[bytes] | None = None,
        *,
        length: int | None = None,
        seconds: float | None = None,
        refusal: type[MilesError] = RunError,
        success: bool = False,
        json_answer: bool = True,
    ) -> Any:
        """The answer as JSON.

        Args:
            method, path, body: Of the request; pieces are sent as they come.
            length: Of all pieces together.
            seconds: Deadline for the whole call; None: that of control calls.
            refusal: Raised for HTTP 4xx.
            success: The answer must say ``success: true``.
            json_answer: Whether there is an answer to read.
        """
        seconds = self._deadlines.control_s if seconds is None else seconds
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        headers = {"Content-Type": "application/json"} | ({} if length is None else {"Content-Length": str(length)})
        response = await self._request(method, path, content, headers, seconds)
        self._check_status(response, path, refusal)
        if not json_answer:
            return None
        try:
            answer = response.json()
        except (ValueError, RecursionError) as error:
            raise InfrastructureFailure(
                f"{self.name} answered {path} with {len(response.content)} bytes that are no JSON ({error}): "
                f"{response.text[:80]!r}. {self.log()}"
            ) from error
        if success and (not isinstance(answer, dict) or answer.get("success") is not True):
            raise refusal(f"{self.name} did not do {path}: {_message(response)}")
        return answer

    async def _request(
        self, method: str, path: str, content: bytes | AsyncIterator[bytes] | None, headers: dict[str, str], seconds: float
    ) -> httpx.Response:
        try:
            async with asyncio.timeout(seconds):
                return await self._http.request(method, path, content=content, headers=headers)
        except TimeoutError as error:
            raise Silence(f"{self.name} did not answer {path} within {seconds:g} s. {self.log()}") from error
        except httpx.HTTPError as error:
            raise InfrastructureFailure(f"{self.name} broke off {path}: {type(error).__name__}: {error}. {self.log()}") from error
        except RuntimeError as error:  # httpx says so of a client that is closed
            raise InfrastructureFailure(f"{self.name} is not called any more ({path}): {error}") from error

    async def _repeated(self, method: str, path: str, body: dict[str, Any] | None = None, **how: Any) -> Any:
        """``_call`` of what does no harm twice, again after a failure other than silence."""
        for attempt in range(1, TRIES):
            try:
                return await self._call(method, path, body, **how)
            except Silence:
                raise
            except InfrastructureFailure:
                await asyncio.sleep(attempt * PAUSE_SECONDS)
        return await self._call(method, path, body, **how)

    def _check_status(self, response: httpx.Response, path: str, refusal: type[MilesError]) -> None:
        status = response.status_code
        if status < 400:
            return
        if status in (401, 403):
            raise ConfigError(f"{self.name} at {self.url} does not take the API key for {path} (HTTP {status}); see key_variable")
        if status == 404:
            raise ConfigError(f"{self.name} at {self.url} has no {path}: it is no SGLang server, or one of another release")
        if status < 500 and status not in (408, 429):  # these two say: later
            raise refusal(f"{self.name} refuses {path} (HTTP {status}): {_message(response)}")
        raise InfrastructureFailure(f"{self.name} failed in {path} (HTTP {status}): {_message(response)}. {self.log()}")

    def _read(self, read: Callable[[], Any], path: str) -> Any:
        """Parse an answer; one that lacks something or cannot be true says nothing about the policy."""
        try:
            return read()
        except (Malformed, KeyError, TypeError, ValueError, IndexError, OverflowError, RecursionError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise InfrastructureFailure(f"{self.name} answered {path} with what cannot be right: {what}. {self.log()}") from error
        except (DataError, InfrastructureFailure) as error:
            raise type(error)(f"{self.name}: {error}") from error


def _message(response: httpx.Response) -> str:
    """What the server says, as short as it can be had."""
    try:
        answer = response.json()
    except ValueError:
        return repr(response.text[:EXCERPT])
    if isinstance(answer, dict):
        said = answer.get("message") or answer.get("error") or answer.get("detail") or answer
        answer = said.get("message", said) if isinstance(said, dict) else said
    return str(answer)[:EXCERPT]
