"""BMTrain's own Python code on CPUs: what it takes from CUDA and from its compiled module, done by torch and gloo.

``install(version)`` puts an unmodified BMTrain on the path and, around it: a ``torch.cuda`` that does nothing; the name
"cuda" for CPU tensors; and ``bmtrain.C``, whose functions get pointers as the compiled ones do: NCCL's calls over
gloo, the kernels of csrc/ (Adam, the search for overflows) in torch. Everything else is BMTrain's: blocks, gathering,
reduction, checkpointing, optimizers, loss scale.
"""

from __future__ import annotations

import ctypes
import os
import socket
import sys
import types
from contextlib import contextmanager
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

VERSIONS = ("0.2.3.post2", "1.0.1")
HOME = Path(__file__).parents[3] / ".bmtrain"

# nccl.h
_TYPES = {
    0: torch.int8,
    1: torch.uint8,
    2: torch.int32,
    4: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.bfloat16,
}
_SUM, _MAX = 0, 2


def require(version: str) -> None:
    """Skip the test where this BMTrain is not at hand."""
    if not is_installed(version) and not (HOME / version / "bmtrain").is_dir():
        pytest.skip(f"BMTrain {version} is not in {HOME}; `make test` puts it there where it can be downloaded")


def is_installed(version: str) -> bool:
    """Whether this very version is among Python's packages, as `make test-python38` has it."""
    try:
        return metadata.version("bmtrain") == version
    except metadata.PackageNotFoundError:
        return False


def install(version: str) -> None:
    """Prepare this process for BMTrain; there is no way back."""
    if not is_installed(version):
        sys.path.insert(0, str(HOME / version))
    mode = _CudaIsCpu()
    mode.__enter__()
    _keep_in_backward(mode)
    _fake_cuda()
    # BMTrain divides the CPUs among its ranks; here tests do.
    torch.set_num_threads = lambda number: None
    os.sched_setaffinity = lambda process, cpus: None
    sys.modules["bmtrain.C"] = _compiled_module()


class _CudaIsCpu(TorchFunctionMode):
    """Every "cuda" that torch is asked for is the CPU, and every tensor says that it is on a GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.device:
            return function(*args, **kwargs)
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        args = tuple(_on_cpu(value) for value in args)
        kwargs = {name: _on_cpu(value) for name, value in kwargs.items() if name != "pin_memory"}
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "not implemented for 'Half'" not in str(error):
                raise
            return _in_fp32(function, args, kwargs)


def _in_fp32(function, args, kwargs):
    """Compute in fp32 and round, as a GPU does: torch 1.13 has few operations in fp16 for CPUs."""
    widened = (value.float() if _is_half(value) else value for value in args)
    return function(*widened, **kwargs).half()


def _is_half(value) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.float16


def _keep_in_backward(mode: TorchFunctionMode) -> None:
    """Torch leaves a mode while it handles a call; BMTrain's code is called back from within ``backward``."""
    plain = torch.autograd.function.BackwardCFunction.apply

    def apply(node, *gradients):
        with mode:
            return plain(node, *gradients)

    torch.autograd.function.BackwardCFunction.apply = apply


def _on_cpu(value):
    """Return the CPU for a CUDA device, anything else unchanged."""
    if isinstance(value, torch.device) and value.type == "cuda" or isinstance(value, str) and value.startswith("cuda"):
        return torch.device("cpu")
    return value


def _fake_cuda() -> None:
    cuda = torch.cuda
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 8
    cuda.current_device = lambda: 0
    cuda.get_device_name = lambda device=None: "no GPU at all"
    cuda.get_device_capability = lambda device=None: (7, 0)  # too old for flash-attention
    cuda.set_device = cuda.synchronize = lambda device=None: None
    cuda.cudart = _Runtime
    cuda.is_current_stream_capturing = lambda: False  # a torch built for CUDA asks the driver
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    cuda.Stream = cuda.Event = _Inert
    cuda.current_stream = lambda device=None: _Inert()
    cuda.stream = _nothing
    cuda.FloatTensor = torch.FloatTensor
    for name in ("Float", "Double", "Half", "BFloat16", "Char", "Byte", "Short", "Int", "Long", "Bool"):
        setattr(cuda, f"{name}Storage", getattr(torch, f"{name}Storage"))
    torch.Tensor.record_stream = lambda tensor, stream: None
    torch.storage.TypedStorage.is_cuda = property(lambda storage: True)


class _Runtime:
    """CUDA's runtime, to which all memory is pinned."""

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        """Succeed."""
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        """Succeed."""
        return 0


class _Inert:
    """A stream or an event of a device that has always finished."""

    cuda_stream = 0

    def __init__(self, *_, **__) -> None:
        pass

    def nothing(self, *_) -> None:
        """Everything has happened already."""

    wait_stream = wait_event = record_event = record = synchronize = wait = nothing

    def elapsed_time(self, other) -> float:
        """Time does not pass."""
        return 0.0


@contextmanager
def _nothing(_stream):
    yield


class Communicator:
    """NCCL's calls on memory addresses, over a gloo group."""

    def __init__(self, port: int, world_size: int, rank: int) -> None:
        patience = timedelta(seconds=60)
        store = dist.TCPStore("127.0.0.1", port, world_size, rank == 0, timeout=patience)
        self._group = dist.ProcessGroupGloo(store, rank, world_size, patience)
        self.world_size, self.rank = world_size, rank

    def gather(self, source: int, count: int, kind: int) -> list[torch.Tensor]:
        """Return every rank's values."""
        own = _view(source, count, _TYPES[kind]).view(torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.world_size)]
        self._group.allgather([parts], [own]).wait()
        return [part.view(_TYPES[kind]) for part in parts]


def _reduced(parts: list[torch.Tensor], operator: int) -> torch.Tensor:
    """Sum (in fp32, rounded once, in the order of ranks) or maximum."""
    if operator == _MAX:
        return torch.stack(parts).amax(0)
    assert operator == _SUM
    wide = torch.float32 if parts[0].dtype in (torch.float16, torch.bfloat16) else parts[0].dtype
    return sum(part.to(wide) for part in parts).to(parts[0].dtype)


def _view(address: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """Return memory as a tensor."""
    if count == 0:
        return torch.empty(0, dtype=dtype)
    raw = (ctypes.c_char * (count * torch.empty((), dtype=dtype).element_size())).from_address(address)
    return torch.frombuffer(raw, dtype=dtype)


_communicators: list[Communicator] = []


def _compiled_module() -> types.ModuleType:
    module = types.ModuleType("bmtrain.C")
    functions = {
        "ncclGetUniqueId": _unique_id,
        "ncclCommInitRank": _init_rank,
        "ncclCommDestroy": lambda comm: None,
        "ncclCommCount": lambda comm: _communicators[comm].world_size,
        "ncclCommUserRank": lambda comm: _communicators[comm].rank,
        "ncclGroupStart": lambda: None,
        "ncclGroupEnd": lambda: None,
        "ncclAllGather": _all_gather,
        "ncclAllReduce": _all_reduce,
        "ncclReduceScatter": _reduce_scatter,
        "ncclBroadcast": _broadcast,
        "is_bf16_supported": lambda: True,
        "adam_launcher": _adam_scaled,
        "adam_fp16_launcher": _adam_scaled,
        "adam_bf16_launcher": lambda n, p, h, g, m, v, *rest: adam_on_cpu(torch.bfloat16, n, p, h, g, m, v, *rest[:-1]),
        "adam_cpu_launcher": lambda *arguments: adam_on_cpu(torch.float16, *arguments),
        "adam_cpu_fp16_launcher": lambda n, p, h, delta, *rest: adam_on_cpu(torch.float16, n, p, h, *rest),
        "adam_cpu_bf16_launcher": lambda n, p, h, delta, *rest: adam_on_cpu(torch.bfloat16, n, p, h, *rest),
        "has_nan_inf_launcher": lambda *arguments: _find_overflow(torch.float16, *arguments),
        "has_nan_inf_fp16_launcher": lambda *arguments: _find_overflow(torch.float16, *arguments),
        "has_nan_inf_bf16_launcher": lambda *arguments: _find_overflow(torch.bfloat16, *arguments),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module


def _unique_id() -> bytes:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1]).encode()


def _init_rank(unique_id: bytes, world_size: int, rank: int) -> int:
    _communicators.append(Communicator(int(unique_id), world_size, rank))
    return len(_communicators) - 1


def _all_gather(source, target, count, kind, comm, stream) -> None:
    parts = _communicators[comm].gather(source, count, kind)
    _view(target, count * len(parts), _TYPES[kind]).copy_(torch.cat(parts))


def _all_reduce(source, target, count, kind, operator, comm, stream) -> None:
    parts = _communicators[comm].gather(source, count, kind)
    _view(target, count, _TYPES[kind]).copy_(_reduced(parts, operator))


def _reduce_scatter(source, target, count, kind, operator, comm, stream) -> None:
    communicator = _communicators[comm]
    parts = communicator.gather(source, count * communicator.world_size, kind)
    own = slice(count * communicator.rank, count * (communicator.rank + 1))
    _view(target, count, _TYPES[kind]).copy_(_reduced([part[own] for part in parts], operator))


def _broadcast(source, target, count, kind, root, comm, stream) -> None:
    parts = _communicators[comm].gather(source, count, kind)
    _view(target, count, _TYPES[kind]).copy_(parts[root])


def _adam_scaled(
    n, param, half, grad, m, v, beta1, beta2, eps, lr, scale, decay, correction1, correction2, stream
) -> None:
    """csrc/cuda/adam_cuda.cu, fp16: the moments are in units of the scaled loss, the first in fp16."""
    p, m, v = _view(param, n, torch.float32), _view(m, n, torch.float16), _view(v, n, torch.float32)
    g = _view(grad, n, torch.float16).float()
    first = beta1 * m.float() + (1 - beta1) * g
    v.copy_(beta2 * v + (1 - beta2) * g * g / scale)
    p.copy_(p - lr * first / correction1 / ((v * scale / correction2).sqrt() + eps * scale) - lr * decay * p)
    m.copy_(first)
    _view(half, n, torch.float16).copy_(p)


def adam_on_cpu(
    dtype, n, param, half, grad, m, v, beta1, beta2, eps, lr, scale, decay, correction1, correction2
) -> None:
    """csrc/include/adam_cpu.hpp, and bf16 in csrc/cuda/adam_cuda.cu: the moments are in units of the loss, in fp32."""
    p, m, v = (_view(address, n, torch.float32) for address in (param, m, v))
    g = _view(grad, n, dtype).float() / scale
    m.copy_(beta1 * m + (1 - beta1) * g)
    v.copy_(beta2 * v + (1 - beta2) * g * g)
    p.copy_(p - lr * m / correction1 / ((v / correction2).sqrt() + eps) - lr * decay * p)
    _view(half, n, dtype).copy_(p)


def _find_overflow(dtype, n, grad, middle, out, stream) -> None:
    """csrc/cuda/has_inf_nan.cu."""
    if not _view(grad, n, dtype).isfinite().all():
        _view(out, 1, torch.uint8).fill_(1)
