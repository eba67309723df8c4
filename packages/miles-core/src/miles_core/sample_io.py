"""Samples in a safetensors file (never pickle): columns end to end, scalars as JSON in the tensor ``samples`` (uint8).

Tensors are named ``column#variant`` (a variant is one dtype and trailing shape), ragged ones with ``.values`` and
``.offsets``, attachments by ``blob.KEY.NAME``: an image that sixteen samples share is written once. The header holds the
format and a hash of all tensors, so that a damaged file is known as one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .columns import COLUMNS, Attachment, Attachments, Blob, Column, Ragged, column_spec, concat_columns
from .errors import DataError, RunError
from .sample import Sample, SampleId, SamplingSpan, Status, Turn

FORMAT = "miles-samples-1"


def save_samples(path: str | Path, samples: Sequence[Sample]) -> None:
    """Write samples to ``path``, whole or not at all (a temporary file, then a rename).

    Raises:
        DataError: A sample's metadata, label or other scalar cannot be written as JSON.
        RunError: The file cannot be written (disk full, no such directory).
    """
    tensors: dict[str, np.ndarray] = {}
    parts: dict[str, list[Column]] = {}
    headers: list[str] = []
    for sample in samples:
        placed = {}
        for name, column in sample.columns.items():
            if isinstance(column, Attachments):
                placed[name] = [[a.start, a.end, a.blob.key] for a in column.items]
                for a in column.items:
                    tensors |= {f"blob.{a.blob.key}.{n}": np.asarray(t, order="C") for n, t in a.blob.tensors.items()}
            else:
                variant = _variant(name, column)
                placed[name] = variant
                parts.setdefault(variant, []).append(column)
        try:
            headers.append(json.dumps(_header(sample) | {"columns": placed}))
        except (TypeError, ValueError) as error:
            raise DataError(f"sample {sample.id}: its metadata, label or another of its scalars is not JSON ({error})") from error
    for variant, columns in parts.items():
        whole = concat_columns(column_spec(variant.split("#")[0]), columns)
        if isinstance(whole, Ragged):
            tensors |= {f"{variant}.values": whole.values, f"{variant}.offsets": whole.offsets}
        elif isinstance(whole, np.ndarray):
            tensors[variant] = np.ascontiguousarray(whole)
    tensors["samples"] = np.frombuffer(f"[{','.join(headers)}]".encode(), np.uint8)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        save_file(tensors, partial, metadata={"format": FORMAT, "hash": Blob(tensors).key})
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path}: samples cannot be written ({error}). Is there room on the disk?") from error


def load_samples(path: str | Path) -> list[Sample]:
    """Read what ``save_samples`` wrote.

    Raises:
        DataError: The file is missing, truncated, damaged, of another format, or holds a column that is not declared.
    """
    metadata, tensors = _read(path)
    if Blob(tensors).key != metadata["hash"]:
        raise DataError(f"{path}: damaged, its tensors are not those that were written. Restore it from a copy")
    headers = json.loads(tensors["samples"].tobytes())
    undeclared = sorted({name for header in headers for name in header["columns"]} - COLUMNS.keys())
    if undeclared:
        raise DataError(f"{path}: its column {undeclared[0]!r} is not declared; import the plug-in that declares it with register_column")
    blobs = _blobs(tensors)
    cursor: dict[str, int] = {}
    return [_sample(header, tensors, blobs, cursor) for header in headers]


def read_headers(path: str | Path, columns: Sequence[str] = ()) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """What the samples of a file are, without their data: for lists of many. The hash is not checked; ``load_samples`` does that.

    Args:
        path: What ``save_samples`` wrote.
        columns: Token columns that every sample has, such as ``versions``.

    Returns:
        For each sample its scalars by name (``id`` a mapping, ``length`` T), and the columns, end to end.

    Raises:
        DataError: The file is missing, truncated, of another format, or what is read of it is damaged.
    """
    names = {name: f"{name}#{column_spec(name).dtypes[0]}" for name in columns}
    _, tensors = _read(path, ["samples", *names.values()])
    try:
        headers = json.loads(tensors["samples"].tobytes())
    except ValueError as error:
        raise DataError(f"{path}: damaged, its list of samples cannot be read ({error}). Restore it from a copy") from error
    return headers, {name: tensors[variant] for name, variant in names.items()}


def _read(path: str | Path, names: Sequence[str] | None = None) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """The header of a file and its tensors, all or the named ones."""
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise DataError(
                    f"{path}: format {metadata.get('format')!r}, expected {FORMAT!r}; it is no file of samples, or another Miles wrote it"
                )
            return metadata, {name: file.get_tensor(name) for name in (file.keys() if names is None else names)}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: cannot be read as samples ({error}). Is it complete?") from error


def _variant(name: str, column: np.ndarray | Ragged) -> str:
    values = column.values if isinstance(column, Ragged) else column
    trailing = "x".join(map(str, values.shape[1:]))
    return f"{name}#{values.dtype.name}" + (f":{trailing}" if trailing else "")


def _header(sample: Sample) -> dict[str, Any]:
    scalars = ("prompt", "label", "reward", "rewards", "metadata", "timings")
    return {name: getattr(sample, name) for name in scalars} | {
        "id": asdict(sample.id),
        "length": len(sample),
        "status": sample.status.value,
        "spans": [asdict(s) for s in sample.spans],
        "turns": [asdict(t) for t in sample.turns],
    }


def _blobs(tensors: dict[str, np.ndarray]) -> dict[str, Blob]:
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        if name.startswith("blob."):
            _, key, tensor_name = name.split(".", 2)
            found.setdefault(key, {})[tensor_name] = tensor
    return {key: Blob(named) for key, named in found.items()}


def _sample(header: dict[str, Any], tensors: dict[str, np.ndarray], blobs: dict[str, Blob], cursor: dict[str, int]) -> Sample:
    columns: dict[str, Column] = {}
    length = header["length"]
    for name, placed in header["columns"].items():
        if isinstance(placed, list):
            columns[name] = Attachments(tuple(Attachment(s, e, blobs[key]) for s, e, key in placed), length)
            continue
        start = cursor.get(placed, 0)
        cursor[placed] = start + length
        if column_spec(name).kind == "ragged":
            whole = Ragged(tensors[f"{placed}.values"], tensors[f"{placed}.offsets"])
            columns[name] = whole.take(np.arange(start, start + length))
        else:
            columns[name] = tensors[placed][start : start + length]
    return Sample(
        SampleId(**header["id"]),
        columns,
        status=Status(header["status"]),
        spans=[SamplingSpan(**s) for s in header["spans"]],
        turns=[Turn(**t) for t in header["turns"]],
        **{name: header[name] for name in ("prompt", "label", "reward", "rewards", "metadata", "timings")},
    )
