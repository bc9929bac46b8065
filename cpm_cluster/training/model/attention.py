"""Attention over packed rows: several documents share a row and must not see one another.

:func:`attend` is the one attention function of the model. Behind it are four kernels: flash-attention's varlen
function, torch's own (``torch.nn.attention.varlen``), SDPA, and the formula written out. :func:`choose_kernel` takes
the first that can run here. The first two read where documents begin (``cu_seqlens``) and need no mask.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cpm_cluster.training.errors import UserError
from cpm_cluster.training.settings import Settings

FLASH_SM = (8, 0)  # flash-attention 2: Ampere or newer
_FLASH_HEAD_DIM = 256
_HALF = (torch.float16, torch.bfloat16)


class Segments(NamedTuple):
    """Where documents begin in B rows of T tokens, the rows laid end to end; padding makes segments, too.

    ``cu_seqlens`` int32 [N + 1] runs from 0 to B T; ``max_seqlen`` is the longest of the N.
    """

    cu_seqlens: Tensor
    max_seqlen: int


class Kernel(NamedTuple):
    """A way to compute attention; ``why`` says what stood against better ones.

    ``dtype`` is what queries will have, None: what the hidden states have.
    """

    name: str
    attend: Callable[[Tensor, Tensor, Tensor, PackedLayout], Tensor]
    takes_segments: bool
    dtype: torch.dtype | None = None
    why: str = ""

    def __str__(self) -> str:
        return f"attention: {self.name}" + (f" ({self.why})" if self.why else "")


@dataclass(frozen=True)
class PackedLayout:
    """What attention must know about a batch of B packed rows of T tokens; built once, read by every layer.

    ``rotation`` is the cosine and sine [B, T, 1, D] of each position. ``segments`` is for kernels that take it.
    ``bias`` [B, 1, T, S] is 0 where a query may see one of S keys and -inf elsewhere; None where each row is one
    document, or the kernel takes segments. ``cache`` keeps the keys and values of generation.

    No tuple: FSDP2 and BMTrain would look for tensors in one, to cast or to differentiate them.
    """

    kernel: Kernel
    rotation: tuple[Tensor, Tensor]
    segments: Segments | None = None
    bias: Tensor | None = None
    cache: KeyValueCache | None = None


class KeyValueCache:
    """The keys and values of B rows of up to ``capacity`` tokens, by layer, and what document each token is of."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._past = 0
        self.documents = torch.empty(0)

    def open(self, documents: Tensor) -> bool:
        """Take the next tokens' ``documents`` [B, Q]; return whether they are the first."""
        self._past = self.documents.shape[-1]
        self.documents = torch.cat((self.documents, documents), dim=1) if self._past else documents
        return self._past == 0

    def extend(self, layer: object, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add a layer's keys and values [B, Q, K, D] of the opened tokens; return all so far [B, S, K, D]."""
        size = self.documents.shape[1]
        if id(layer) not in self._layers:
            shape = (key.shape[0], self._capacity, *key.shape[2:])
            self._layers[id(layer)] = (key.new_empty(shape), value.new_empty(shape))
        keys, values = self._layers[id(layer)]
        keys[:, self._past : size] = key
        values[:, self._past : size] = value
        return keys[:, :size], values[:, :size]


def segments_of(documents: Tensor) -> Segments:
    """Return the segments of rows whose tokens belong to ``documents`` [B, T]; on a GPU this waits for it."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    cu_seqlens = torch.cat((starts, starts.new_tensor([documents.numel()]))).to(torch.int32)
    return Segments(cu_seqlens, int(cu_seqlens.diff().max()))


def packed_layout(
    documents: Tensor,
    rotation: tuple[Tensor, Tensor],
    kernel: Kernel,
    dtype: torch.dtype,
    segments: Segments | None = None,
    cache: KeyValueCache | None = None,
) -> PackedLayout:
    """Return the layout of rows whose tokens belong to ``documents`` [B, T]; ``dtype`` is that of hidden states.

    Segments, if given, are those of the documents. With a cache that holds S - T tokens, the T are the next ones.
    """
    dtype = kernel.dtype or dtype
    if cache is not None and not cache.open(documents):
        seen = _bias(documents, cache.documents, dtype)
        return PackedLayout(portable_kernel(), rotation, bias=seen, cache=cache)
    segments = segments_of(documents) if segments is None else segments
    if kernel.takes_segments:
        there = segments.cu_seqlens.to(documents.device, non_blocking=True)
        return PackedLayout(kernel, rotation, Segments(there, segments.max_seqlen), cache=cache)
    one_each = segments.cu_seqlens.numel() == documents.shape[0] + 1
    bias = None if one_each else _bias(documents, documents, dtype)
    return PackedLayout(kernel, rotation, bias=bias, cache=cache)


def _bias(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 0 where a query sees a key, else -inf: [B, 1, Q, S]; the queries are the last of the keys' tokens."""
    count, total = queries.shape[1], keys.shape[1]
    causal = torch.ones(count, total, dtype=torch.bool, device=keys.device).tril(total - count)
    visible = (queries[:, :, None] == keys[:, None, :]) & causal
    bias = torch.zeros(visible.shape, dtype=dtype, device=keys.device)
    return bias.masked_fill_(~visible, -math.inf)[:, None]


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each [B, T, 1, head_dim], of the rotary embedding.

    Position p turns pair i by ``p * theta ** (-2 i / head_dim)`` (Su et al. 2021, RoFormer, eq. 15).
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, :, None, None].float() * theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(heads: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn ``heads`` [B, T, H, D]; pairs are (i, i + D/2), the "half rotation" of CPM-9G and Llama."""
    cosine, sine = rotation
    first, second = heads.float().chunk(2, dim=-1)
    turned = heads.float() * cosine + torch.cat((-second, first), dim=-1) * sine
    return turned.to(heads.dtype)


def attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
    """Return softmax(Q Kᵀ / √D) V within each document, causally: [B, T, H, D].

    ``query`` is [B, T, H, D]; ``key`` and ``value`` are [B, S, K, D] where K divides H (grouped-query attention) and
    S is T, or more with a cache.
    """
    return layout.kernel.attend(query, key, value, layout)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Attention [B, H, T, D] written out, the softmax in fp32 (fp64 of fp64); without a bias it is causal."""
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if bias is None:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    else:
        scores = scores + bias
    return scores.softmax(dim=-1).to(value.dtype) @ value


def _attend_plainly(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
    key, value = (_for_every_query(heads, query) for heads in (key, value))
    query, key, value = (heads.transpose(1, 2) for heads in (query, key, value))
    return plain_attention(query, key, value, layout.bias).transpose(1, 2)


def _attend_sdpa(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
    bias, grouped = layout.bias, query.shape[2] != key.shape[2]
    if grouped and query.shape[1] == 1 and bias is not None:
        # One token: the queries that share a key are rows of one product, and the cache is not copied.
        rows = query.view(query.shape[0], key.shape[2], -1, query.shape[3])
        mixed = _sdpa(rows, key.transpose(1, 2), value.transpose(1, 2), attn_mask=bias.to(query.dtype))
        return mixed.reshape(query.shape)
    options: dict[str, Any] = {"is_causal": True} if bias is None else {"attn_mask": bias.to(query.dtype)}
    if grouped and bias is None and _sdpa_groups(query):
        options["enable_gqa"] = True
    elif grouped:
        key, value = (_for_every_query(heads, query) for heads in (key, value))
    return _sdpa(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), **options).transpose(1, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    mixed: Tensor = functional.scaled_dot_product_attention(query, key, value, **options)
    return mixed


def _sdpa_groups(query: Tensor) -> bool:
    """Whether causal SDPA takes fewer key heads than query heads, and no worse kernel for that.

    It can since torch 2.5 (a builtin has no signature to look at). On CUDA the flash kernel alone has groups: without
    it, and with any mask, torch would take the kernel that stores all scores.
    """
    if "enable_gqa" not in (functional.scaled_dot_product_attention.__doc__ or ""):
        return False
    return query.device.type != "cuda" or (
        query.dtype in _HALF
        and query.shape[-1] <= _FLASH_HEAD_DIM
        and torch.cuda.get_device_capability(query.device) >= FLASH_SM
    )


def _for_every_query(heads: Tensor, query: Tensor) -> Tensor:
    """Repeat key or value heads [B, S, K, D] so that each of the H query heads has its own."""
    group = query.shape[2] // heads.shape[2]
    return heads if group == 1 else heads.repeat_interleave(group, dim=2)


def flash_kernel(function: Callable[..., Any], deterministic: bool) -> Kernel:
    """Wrap ``flash_attn_varlen_func`` of flash-attn 2.0.8 to 2.8; ``deterministic`` came with 2.4."""
    options: dict[str, Any] = {"causal": True}
    if deterministic:
        options["deterministic"] = True
    return Kernel("flash", _varlen(function, options), True)


def varlen_kernel(function: Callable[..., Any]) -> Kernel:
    """Wrap ``torch.nn.attention.varlen.varlen_attn``: causal is a flag in torch 2.10 and a window later."""
    parameters = inspect.signature(function).parameters
    options: dict[str, Any] = {"is_causal": True} if "is_causal" in parameters else {"window_size": (-1, 0)}
    if "enable_gqa" not in parameters:
        return Kernel("varlen", _varlen(function, options, repeat=True), True)
    return Kernel("varlen", _varlen(function, {**options, "enable_gqa": True}), True)


def _varlen(
    function: Callable[..., Any], options: dict[str, Any], repeat: bool = False
) -> Callable[[Tensor, Tensor, Tensor, PackedLayout], Tensor]:
    """Both varlen functions take [tokens, heads, D], and begins and lengths of queries and of keys."""

    def attend_segments(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout) -> Tensor:
        assert layout.segments is not None
        begins, longest = layout.segments
        if repeat:
            key, value = (_for_every_query(heads, query) for heads in (key, value))
        heads = (query.flatten(0, 1), key.flatten(0, 1), value.flatten(0, 1))
        mixed: Tensor = function(*heads, begins, begins, longest, longest, **options)
        return mixed.view_as(query)

    return attend_segments


_SDPA = Kernel("sdpa", _attend_sdpa, False)
_MATH = Kernel("math", _attend_plainly, False)


def portable_kernel() -> Kernel:
    """Return what runs on every device: SDPA, or the formula where torch is older than 2.0."""
    return _SDPA if hasattr(functional, "scaled_dot_product_attention") else _MATH


class _Unsuitable(Exception):
    """Why a kernel cannot run here."""


class Demands(NamedTuple):
    """Where and what attention will compute."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    deterministic: bool


def open_kernel(settings: Settings, rank: int, device: torch.device, dtype: torch.dtype) -> Kernel:
    """Choose by the settings for a model that computes in ``dtype`` on ``device``, and say so from rank 0."""
    demands = Demands(device, dtype, settings.model.head_dim, settings.deterministic)
    kernel = choose_kernel(settings.training.attention, demands)
    if rank == 0:
        print(kernel, flush=True)
    return kernel


def choose_kernel(wanted: str, demands: Demands) -> Kernel:
    """Return the kernel that ``training.attention`` names, or for "auto" the first that can run.

    Raises UserError when the one that is named cannot.
    """
    reasons = []
    for name in _LOADERS if wanted == "auto" else (wanted,):
        try:
            kernel = _LOADERS[name](demands)
        except _Unsuitable as reason:
            reasons.append(str(reason))
        else:
            return kernel._replace(dtype=demands.dtype, why="; ".join(reasons))
    instead = portable_kernel().name
    raise UserError(f"training.attention: {wanted} cannot run here: {reasons[0]}; write auto, or {instead}")


def _load_flash(demands: Demands) -> Kernel:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise _Unsuitable("flash_attn is not installed") from error
    except ImportError as error:  # built for another torch, or older than 2.0
        raise _Unsuitable("flash_attn cannot be imported: {}".format(str(error).split("\n")[0])) from error
    _require_flash_hardware("flash", demands)
    if demands.deterministic and "deterministic" not in inspect.signature(flash_attn_varlen_func).parameters:
        raise _Unsuitable("this flash_attn has no deterministic backward (2.4 has)")
    return flash_kernel(flash_attn_varlen_func, demands.deterministic)


def _load_varlen(demands: Demands) -> Kernel:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise _Unsuitable(f"torch {torch.__version__} has no varlen_attn (2.10 has)") from error
    _require_flash_hardware("varlen", demands)
    if demands.head_dim % 8:
        raise _Unsuitable(f"varlen needs a head_dim that 8 divides, not {demands.head_dim}")
    return varlen_kernel(varlen_attn)


def _require_flash_hardware(name: str, demands: Demands) -> None:
    if demands.device.type != "cuda":
        raise _Unsuitable(f"{name} needs a GPU")
    capability = torch.cuda.get_device_capability(demands.device)
    if capability < FLASH_SM:
        raise _Unsuitable("{} needs a GPU of sm_80 or newer, this is sm_{}{}".format(name, *capability))
    if demands.dtype not in _HALF:
        raise _Unsuitable(f"{name} computes in bf16 and fp16, not in fp32")
    if demands.head_dim > _FLASH_HEAD_DIM:
        raise _Unsuitable(f"{name} takes a head_dim of up to {_FLASH_HEAD_DIM}, not {demands.head_dim}")


def _load_sdpa(demands: Demands) -> Kernel:
    if not hasattr(functional, "scaled_dot_product_attention"):
        raise _Unsuitable(f"torch {torch.__version__} has no scaled_dot_product_attention (2.0 has)")
    return _SDPA


def _load_math(demands: Demands) -> Kernel:
    return _MATH


# The best first.
_LOADERS: dict[str, Callable[[Demands], Kernel]] = {
    "flash": _load_flash,
    "varlen": _load_varlen,
    "sdpa": _load_sdpa,
    "math": _load_math,
}
