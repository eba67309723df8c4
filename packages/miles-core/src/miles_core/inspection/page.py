"""``miles inspect RUN --html FILE``: one self-contained page. It asks no network for anything, and treats all text of a model as text.

What is in it: of every trajectory its facts, in columns, in one compressed block; the tokens with their values of as many as fit the
budget, group by group and evenly over the files, in one compressed block a group, unpacked when it is looked at. What a page holds is
thus bounded by its budget of tokens and some 20 bytes a trajectory.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import ConfigError, DataError, MilesError, RunError
from ..run_dir import RunDir
from ..sample import Sample
from .facts import TRAIN, Facts, TrajectoryFile
from .plain import finite
from .tokens import CLIP, LEAST_LOGPROB, RATIO, Vocabulary, doc_of, log_ratio, quantities, scale_of, stretches

PROMPT = 200
"""Characters of a prompt in the list; the tokens hold all of it."""
GOLDEN = 0.6180339887498949
Block = list[int]
"""Rows (in the list) of the samples whose tokens are stored together: a group's."""


def write_page(
    run: RunDir,
    facts: Iterable[Facts],
    files: Sequence[TrajectoryFile],
    path: Path,
    budget: int,
    warn: Callable[[MilesError], None],
    rewards: str = "",
) -> str:
    """Write the page, whole or not at all.

    Args:
        run: The run.
        facts: The trajectories that it lists.
        files: Where they are.
        path: The page.
        budget: Most tokens that are stored with their values.
        warn: Told of a file that is damaged, or no longer the one that was listed; the others are shown.
        rewards: The filter by reward with which the page opens, as its reader would write it; all are listed without it.

    Returns:
        A sentence about what it holds.

    Raises:
        ConfigError: ``path`` is a directory.
        RunError: The page cannot be written.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; --html names the page's file, such as {path / 'page.html'}")
    listed = list(facts)
    blocks = chosen_blocks(listed, budget)
    place = np.full((len(listed), 2), -1, np.int32)
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as out:
            out.write(_head(run))
            vocabulary, docs = _write_blocks(out, run, listed, files, blocks, place, warn)
            _write_data(out, "index", _index(listed, place, vocabulary, docs, run, rewards))
            out.write(f"<script>{_asset('page.js')}</script>\n</body>\n</html>\n")
        os.replace(partial, path)
    except OSError as error:
        raise RunError(f"{path}: the page cannot be written ({error.strerror}). Is there such a directory, and room?") from error
    finally:
        partial.unlink(missing_ok=True)
    with_tokens, size = int((place[:, 0] >= 0).sum()), path.stat().st_size / 2**20
    few = f"{with_tokens:,} with their tokens (more: --html-tokens, or choose fewer)"
    kept = "all with their tokens" if with_tokens == len(listed) else few
    return f"{path}: {len(listed):,} trajectories, {kept}, {size:.1f} MiB"


def chosen_blocks(facts: Sequence[Facts], budget: int) -> list[Block]:
    """Whole groups within the budget of tokens: the files' first groups, then their second ones …; among files the newest first,
    then spread by the golden ratio, so that whatever fits lies evenly over the run.
    """
    groups: dict[tuple[int, str], dict[tuple[str, str], Block]] = {}
    for row, f in enumerate(facts):
        groups.setdefault((f.step, f.source), {}).setdefault((f.policy, f.group), []).append(row)
    of_file = list(groups.values())
    order = sorted(range(len(of_file)), key=lambda i: (len(of_file) - 1 - i) * GOLDEN % 1)
    turns = sorted((turn, place, list(of_file[i].values())[turn]) for place, i in enumerate(order) for turn in range(len(of_file[i])))
    taken = []
    for _, _, block in turns:
        budget -= sum(facts[row].length for row in block)
        if budget < 0:
            break
        taken.append(block)
    return sorted(taken)


def _write_blocks(
    out: IO[str],
    run: RunDir,
    listed: Sequence[Facts],
    files: Sequence[TrajectoryFile],
    blocks: Sequence[Block],
    place: np.ndarray,
    warn: Callable[[MilesError], None],
) -> tuple[dict[str, list[str] | str | None], dict[str, dict[str, str]]]:
    """The blocks, file by file; ``place`` [rows, 2] gets each sample's block and its place in it.

    Returns:
        The texts of the tokens by policy, and the quantities that are shown of them.
    """
    of_file: dict[tuple[int, str], list[Block]] = {}
    for block in blocks:
        of_file.setdefault((listed[block[0]].step, listed[block[0]].source), []).append(block)
    shown: dict[str, dict[str, str]] = {}
    ids: dict[str, set[int]] = {}
    written = 0
    for file in files:
        wanted = of_file.get((file.step, file.source), [])
        try:
            samples = iter(file.samples([listed[row] for block in wanted for row in block]) if wanted else [])
        except DataError as error:
            warn(error)
            continue
        for block in wanted:
            members = [next(samples) for _ in block]
            _write_bytes(out, f"b{written}", packed(members))
            place[block, 0], place[block, 1] = written, np.arange(len(block))
            written += 1
            for sample in members:
                ids.setdefault(sample.id.policy, set()).update(np.unique(sample.tokens).tolist())
                shown |= {n: {"doc": doc_of(n), "scale": scale_of(n)} for n in quantities(sample) if n not in shown}
    return {policy: _texts(run, policy, sorted(of_policy)) for policy, of_policy in ids.items()}, shown


def _texts(run: RunDir, policy: str, ids: list[int]) -> Any:
    vocabulary = Vocabulary(run, policy)
    texts = vocabulary.texts(ids)
    return {"lacking": vocabulary.lacking} if texts is None else {"ids": ids, "texts": texts}


def packed(samples: Sequence[Sample]) -> bytes:
    """Tokens and values of a few samples: the length of a JSON header (uint32), the header, then its arrays, little-endian.

    The header lists the samples (length, stretches, label) and the arrays (name, dtype, number of values): the columns of the samples
    that have them, end to end. Floats are rounded to 4 digits; a ratio is stored as its logarithm, so that one near 1 keeps its own.
    """
    columns: dict[str, list[np.ndarray]] = {"tokens": [s.tokens for s in samples]}
    has: dict[str, list[int]] = {"tokens": list(range(len(samples)))}
    for number, sample in enumerate(samples):
        for name, values in quantities(sample).items():
            columns.setdefault(name, []).append(log_ratio(sample) if name == RATIO else values)
            has.setdefault(name, []).append(number)
    arrays = {name: _stored(np.concatenate(parts)) for name, parts in columns.items()}
    header = {
        "samples": [
            {"length": len(s), "stretches": [[t.role, t.start, t.end, t.kind] for t in stretches(s)], "label": s.label, "id": str(s.id)}
            for s in samples
        ],
        "arrays": [[name, a.dtype.name, len(a), has[name]] for name, a in arrays.items()],
    }
    text = json.dumps(finite(header), allow_nan=False).encode()
    text += b" " * (-len(text) % 4)
    return np.uint32(len(text)).tobytes() + text + b"".join(a.tobytes() + b"\0" * (-a.nbytes % 4) for a in arrays.values())


def _stored(values: np.ndarray) -> np.ndarray:
    if values.dtype.kind == "f":
        bits = values.astype("<f4").view("<u4")
        return np.where(np.isfinite(values), (bits + 0x400) & 0xFFFFF800, bits).astype("<u4").view("<f4")
    return values.astype(np.uint8) if values.dtype.kind == "b" else values.astype("<i4")


def _index(listed: Sequence[Facts], place: np.ndarray, vocabulary: dict, docs: dict, run: RunDir, rewards: str) -> dict[str, Any]:
    """Everything but tokens, column by column; repeated texts once."""
    columns: dict[str, list] = {name: [f[i] for f in listed] for i, name in enumerate(Facts._fields)}
    columns["number"] = [int(a.rpartition(":")[2]) for a in columns.pop("address")]
    columns["prompt"] = [p[:PROMPT] for p in columns["prompt"]]
    columns["reward"] = finite(columns["reward"])
    columns["rewards"] = [" ".join(f"{n}={v:.4g}" for n, v in r.items()) if len(r) > 1 else "" for r in columns["rewards"]]
    tables = {}
    for name in ("source", "policy", "prompt_id", "group", "prompt", "status", "rewards"):
        known: dict[str, int] = {}
        columns[name] = [known.setdefault(text, len(known)) for text in columns[name]]
        tables[name] = list(known)
    return {
        "run": run.path.resolve().name,
        "command": str(run.path),
        "columns": columns | {"block": place[:, 0].tolist(), "within": place[:, 1].tolist()},
        "tables": tables,
        "vocabulary": vocabulary,
        "quantities": docs,
        "train": TRAIN,
        "rewards": rewards,
        "scales": {"least_logprob": LEAST_LOGPROB, "clip": CLIP},
        "prompt_characters": PROMPT,
    }


def _head(run: RunDir) -> str:
    """Everything above the data. The policy lets nothing run or be fetched but what is named by its hash."""
    style, script = _asset("page.css"), _asset("page.js")
    allowed = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    name = html.escape(run.path.resolve().name)
    fill = {"@NAME@": name, "@POLICY@": html.escape(allowed), "@STYLE@": style}
    text = _asset("page.html")
    for mark, value in fill.items():
        text = text.replace(mark, value)
    return text


def _write_data(out: IO[str], id: str, data: Any) -> None:
    _write_bytes(out, id, json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "replace"))


def _write_bytes(out: IO[str], id: str, data: bytes) -> None:
    """Compressed, in base64: no text of a model stands in the page's own HTML."""
    coded = base64.b64encode(gzip.compress(data, 6, mtime=0)).decode()
    out.write(f'<script type="application/gzip" id="{id}">{coded}</script>\n')


def _asset(name: str) -> str:
    return (resources.files("miles_core.inspection") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
