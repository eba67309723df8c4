"""linear_logprob in torch, chunk by chunk: runs on every device, and is what faster forms are compared with.

Two buffers of [rows, V] are made once a call and every step on them is in place. A weight narrower than the maths is cast in blocks
that take as much. All of it is less than a chunk's logits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from miles_kernels.invariant.rows import filled

CHUNK_BYTES, CHUNK_ROWS = 96 * 2**20, 768
"""Without `chunk`, a chunk has the rows of logits that fit in these bytes, but no fewer than these rows: 768 × 151,936 are 445 MiB.

On a CPU more rows gain nothing, and fewer slow the backward down, as each pass goes over the whole gradient of the weight. On a GPU ask
for more, about 6144.
"""
BUFFER = 5 / 16
"""Part of a chunk's rows that one buffer has: three of them are a little less than the chunk."""


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What these rows of the vocabulary contribute, [T] each in the dtype of `temperature` [T], which is that of the maths.

    `targets` counts from the first row of `weight`; one outside is another rank's. Without rows the contribution is (−∞, 0, 0, 0).
    On a CPU a row's results have the same bits however many rows there are (`miles_kernels.invariant`); `logprob_of_logits` has them too.

    Returns:
        largest: the largest logit z_i.
        total: Σ_i exp(z_i − largest).
        weighted: Σ_i exp(z_i − largest) (z_i − largest).
        target: z_target, 0 where the target is not among these rows.
    """
    count = len(hidden)
    hidden, targets, temperature = filled(hidden), filled(targets), filled(temperature, 1.0)
    largest = torch.full_like(temperature, -torch.inf)
    total, weighted, target = (torch.zeros_like(temperature) for _ in range(3))
    for rows, z, p in _chunks(len(hidden), len(weight), temperature, chunk):
        _logits_(z, hidden[rows], weight, bias, temperature[rows])
        here, index = _here(targets[rows], len(weight))
        target[rows] = z.gather(1, index).squeeze(1) * here
        largest[rows] = z.amax(1)
        z.sub_(largest[rows, None])
        total[rows] = torch.exp(z, out=p).sum(1)
        weighted[rows] = p.mul_(z).sum(1)
    return largest[:count], total[:count], weighted[:count], target[:count]


def exponentials(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits z [T, V], temperature and all, by the steps of `forward`: the largest [R], and exp(z − largest) [R, V].

    R is T, but at least `miles_kernels.invariant.rows.ROWS`; the rows behind stand for rows of zeros.
    """
    z = filled(logits)
    largest = z.amax(1)
    return largest, torch.exp(z - largest[:, None])


def logprob_of_logits(logits: Tensor, targets: Tensor, largest: Tensor, exponentials: Tensor) -> Tensor:
    """log softmax(logits)[target], [T], by the steps of `forward`; for who has logits [T, V], temperature and all, and their
    `exponentials` already."""
    z, targets = filled(logits), filled(targets)
    return (z.gather(1, targets[:, None]).squeeze(1) - largest - exponentials.sum(1).log())[: len(logits)]


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperature: Tensor,
    entropy: Tensor,
    lse: Tensor,
    dlogprob: Tensor | None,
    dentropy: Tensor | None,
    needs: tuple[bool, bool, bool],
    chunk: int | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, each None unless `needs` asks for it; `dlogprob` and `dentropy` are [T], or None for zero.

    `targets` as in `forward`; `entropy` and `lse` are of the whole vocabulary. The gradient of hidden is what these rows of the vocabulary
    add to it, in `dtype`.

    With a = dlogprob / temperature and b = dentropy / temperature, the logits before the temperature get
    −p_i (a + b (log p_i + entropy)) + a [i = target].
    """
    needs_hidden, needs_weight, needs_bias = needs
    dhidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if needs_hidden else None
    dweight = torch.zeros(weight.shape, dtype=temperature.dtype, device=weight.device) if needs_weight else None
    dbias = torch.zeros(len(weight), dtype=temperature.dtype, device=weight.device) if needs_bias else None
    a = torch.zeros_like(temperature) if dlogprob is None else dlogprob / temperature
    b = None if dentropy is None else dentropy / temperature
    c = None if b is None else a + b * entropy

    for rows, z, p in _chunks(len(hidden), len(weight), temperature, chunk):
        _logits_(z, hidden[rows], weight, bias, temperature[rows])
        z.sub_(lse[rows, None])  # log p
        if b is None or c is None:
            z.exp_().mul_(-a[rows, None])
        else:
            torch.exp(z, out=p)
            z.mul_(-b[rows, None]).sub_(c[rows, None]).mul_(p)
        here, index = _here(targets[rows], len(weight))
        z.scatter_add_(1, index, (a[rows] * here)[:, None])

        if dhidden is not None:
            dchunk = torch.zeros(len(z), hidden.shape[1], dtype=z.dtype, device=z.device)
            for columns, block in _blocks(weight, z):
                dchunk.addmm_(z[:, columns], block)
            dhidden[rows] = dchunk
        if dweight is not None:
            dweight.addmm_(z.T, hidden[rows].to(z.dtype))
        if dbias is not None:
            dbias += z.sum(0)

    if dweight is not None:
        dweight = dweight.to(weight.dtype)
    if bias is not None and dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dhidden, dweight, dbias


def _chunks(rows: int, vocab: int, like: Tensor, chunk: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of rows, sizes within one of each other, and for each two [size, V] buffers, the same memory every time."""
    if vocab == 0:
        return
    chunk = chunk or max(CHUNK_ROWS, CHUNK_BYTES // (vocab * like.element_size()))
    held = min(max(1, int(chunk * BUFFER)), rows)
    count = -(-rows // held) if rows else 0
    z, p = (torch.empty(held, vocab, dtype=like.dtype, device=like.device) for _ in range(2))
    for i in range(count):
        start, stop = rows * i // count, rows * (i + 1) // count
        yield slice(start, stop), z[: stop - start], p[: stop - start]


def _here(targets: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """bool [rows]: the target is one of these `vocab` rows; and int64 [rows, 1], where it is then, anywhere else."""
    return (targets >= 0) & (targets < vocab), targets.clamp(0, vocab - 1)[:, None]


def _logits_(z: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: Tensor) -> None:
    """z = (hidden @ weight.T + bias) / temperature, in place and in the dtype of z."""
    hidden = hidden.to(z.dtype)
    for columns, block in _blocks(weight, z):
        torch.mm(hidden, block.T, out=z[:, columns])
    if bias is not None:
        z.add_(bias)
    z.div_(temperature[:, None])


def _blocks(weight: Tensor, z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """The weight in the dtype of z: whole if it is that already, else in blocks of rows, of which two (this and the next) are as z."""
    vocab, width = weight.shape
    size = vocab if weight.dtype == z.dtype else max(1, z.numel() // 2 // max(1, width))
    for start in range(0, vocab, size):
        yield slice(start, start + size), weight[start : start + size].to(z.dtype)
