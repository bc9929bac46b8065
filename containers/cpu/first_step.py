"""Run inside the new image: one training step with all that a run imports, then the bytecode of what that loaded.

Bytecode of the whole of torch takes 160 MB; of what a training run loads, a fifth of that. Without it every rank
spends seconds on compiling. Prints the versions of what is inside, as JSON on the last line.
"""

import importlib.metadata
import io
import json
import os
import platform
import py_compile
import sys

import safetensors.torch  # noqa: F401
import tensorboardX  # noqa: F401
import tokenizers  # noqa: F401
import torch
import torch.distributed as dist
import torch.distributed.run
from pytrie import StringTrie  # noqa: F401
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import distribute_tensor  # noqa: F401
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint


def train_a_step():
    """One step of a wrapped model on one rank, saved and read back."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    for wrap in (DistributedDataParallel, shard):
        model = wrap(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))
        optimizer = torch.optim.AdamW(model.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            loss = checkpoint(model, torch.ones(2, 4), use_reentrant=False).square().sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        file = io.BytesIO()
        torch.save(torch.nn.Linear(4, 4).state_dict(), file)
        torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    dist.destroy_process_group()


def shard(model):
    """As the torch engine shards a model that does not fit on one card."""
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)), mp_policy=MixedPrecisionPolicy())


def compile_loaded():
    """Write the bytecode of each module in use."""
    for module in list(sys.modules.values()):
        source = getattr(module, "__file__", None) or ""
        if source.endswith(".py") and os.path.isfile(source):
            py_compile.compile(source, doraise=True)


train_a_step()
compile_loaded()
packages = ("torch", "numpy", "tensorboardX", "pytrie", "safetensors", "tokenizers")
versions = {name: importlib.metadata.version(name) for name in packages}
print(json.dumps({"python": platform.python_version(), "cuda": torch.version.cuda, **versions}))
