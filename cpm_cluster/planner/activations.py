"""What the forward pass leaves for the backward pass, on one GPU.

Symbols: T tokens of a micro batch, s sequence, h hidden, f FFN width, a heads, t tensor-parallel ranks, V vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cpm_cluster.planner.deepspeed_states import deepspeed_version
from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.fsdp_states import written_for_fsdp
from cpm_cluster.planner.generation import WIDENS_LOGITS, beyond_the_prompt, generation
from cpm_cluster.planner.memory_constants import FITTED, MemoryConstants
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage
from cpm_cluster.planner.states import part, quantises_the_head, weight_bytes, widens_embeddings

KORTHIKANTI = "Korthikanti et al. 2022"
# Beside the logits themselves, where the loss makes them fp32 once and shifts labels in their place: log-softmax 4 and
# its gradient 4.
LOGITS_ONCE = 8.0
SHIFTS_LABELS = (4, 49)  # transformers/loss/loss_utils.py, ForCausalLMLoss


@dataclass(frozen=True)
class Activations:
    """Components by when they are there; in inference as Generation has them, `extra` being of its second step."""

    kept: tuple[Component, ...]  # at the end of the forward pass
    block: tuple[Component, ...]  # for the backward pass of the first block, when all others are done
    extra: tuple[Component, ...]  # what the backward pass of the last block adds to what is kept
    head: tuple[Component, ...]  # logits, and what computes them


def activations(setup: Setup, stage: Stage, constants: MemoryConstants) -> Activations:
    tokens = _tokens(setup)
    if setup.mode == "infer":
        made, unpacked = generation(setup, stage), _dequantised_prompt(setup)
        return Activations(made.cache, made.block, made.second, (*made.logits, *unpacked))
    block = block_bytes_per_token(setup, constants) * tokens
    source = KORTHIKANTI if setup.engine == "megatron" else "counted by tensor; " + FITTED
    head = (*_logits(setup, constants), *_dequantised_head(setup)) if stage.has_head else ()
    wide, blocks = stream_bytes(setup), stage.blocks * _trained_share_of_blocks(setup)
    sent = wide * tokens * setup.shape.hidden * blocks * stage.micro_batches
    if setup.sequence_parallel:
        sent /= setup.tp
    inputs = part("inputs of the blocks", f"{wide}Th × blocks × micro batches", sent, KORTHIKANTI)
    unpacked = _dequantised(setup)
    scores = _gradients_of_scores(setup, tokens)
    one = (part("one block", "T × saved by a block", block, source), *unpacked, *scores)
    if setup.recompute == "full":
        return Activations((inputs,), one, one, head)
    if setup.recompute == "selective" and setup.engine != "megatron":
        size = _matrix_outputs_per_token(setup) * tokens * blocks
        products = part(
            "every second matrix product", "T × outputs / 2", size, "torchtitan/distributed/activation_checkpoint.py"
        )
        return Activations((inputs, products), one, one, head)
    size = block * blocks * stage.micro_batches
    saved = part("activations", "T × saved by a block × blocks", size, source)
    again = _scores_again(setup, tokens)
    return Activations((saved,), (*one, *again), (*unpacked, *again, *scores), head)


def stream_bytes(setup: Setup) -> int:
    """Of an element of the residual stream, which has the type of the embeddings.

    Quantised layers give back the type of their input (bitsandbytes/nn/modules.py, Linear4bit.forward).
    """
    return 4 if widens_embeddings(setup) else weight_bytes(setup)


def _tokens(setup: Setup) -> int:
    """A reward model compares two answers: each sample is two sequences."""
    return setup.tokens * (2 if setup.mode == "reward" else 1)


def _trained_share_of_blocks(setup: Setup) -> float:
    """Blocks below the first that is trained keep nothing for the backward pass."""
    if setup.mode != "reward":
        return 1.0
    blocks = setup.shape.layers * setup.shape.parameters_per_layer
    return min(1.0, setup.trained_parameters / blocks)


def block_bytes_per_token(setup: Setup, constants: MemoryConstants) -> float:
    """Saved by one block for its backward pass."""
    if setup.engine == "megatron":
        return _megatron_block(setup)
    factor = (
        constants.compiled_block
        if setup.compiled
        else constants.plain_block
        if written_for_fsdp(setup)
        else constants.block
    )
    return factor * _eager_block(setup, constants) + _scores_per_token(setup)


def _eager_block(setup: Setup, constants: MemoryConstants) -> float:
    """Tensor by tensor, as plain torch code saves them; frozen linear layers don't keep their inputs.

    Tensor-parallel ranks divide what lies between the two matrices of attention and of the FFN; what is as wide as the
    model is whole on each of them (Shoeybi et al. 2019), and divided too where they are sequence parallel.
    """
    shape, w, t = setup.shape, stream_bytes(setup), setup.tp
    h = shape.hidden / t if setup.sequence_parallel else shape.hidden
    f, attention = shape.ffn / t, shape.attention_width / t + setup.kv_width
    upcasts = shape.gated_mlp or setup.autocasts
    saved = 2.0 * (4 if upcasts else w) * h  # inputs of both norms: RMSNorm, and LayerNorm under autocast, in fp32
    saved += 2 * w * attention  # q, k, v and the output of attention
    saved += w * f * (3 if shape.gated_mlp else 1)  # input of the activation; its output and the gated branch
    if _writes_gelu_out(setup):
        saved += 2 * w * f
    linear_inputs = w * (2 * h + f)
    if setup.trains_adapters:
        inputs = {"o": shape.attention_width / t, "down": f}
        saved += sum(
            (w + 1) * inputs.get(name, h) for name in setup.lora_targets if name in shape.adapter_shapes
        )  # dropped, and the mask
        if setup.quantised:
            saved += constants.quantised_inputs * linear_inputs
        return saved
    saved += linear_inputs
    if shape.gated_mlp:
        saved += 2 * w * h  # normed values, for the gradient of the norm's weight
    elif setup.engine != "fsdp":
        saved += 2 * h  # dropout masks
    return saved


def _writes_gelu_out(setup: Setup) -> bool:
    """In Python, operation by operation: NewGELUActivation of decoders in transformers, and BERT's in apex' time.

    transformers/activations.py; pytorch_pretrained_bert/modeling.py, gelu.
    """
    version = setup.engine_version
    return not setup.shape.gated_mlp and (
        "apex" in version or ("transformers" in version and setup.shape.kind != "bert")
    )


def _scores_per_token(setup: Setup) -> float:
    """Without flash attention: what is kept of s × s elements for every head."""
    if setup.flash_attention:
        return 0.0
    return _bytes_of_a_score(setup) * setup.shape.heads * setup.seq_len / setup.tp


def _bytes_of_a_score(setup: Setup) -> int:
    """Softmax, dropout's mask and its result; models of the Llama family have a softmax in fp32, its cast, no dropout.

    BERT's mask is in fp32 under autocast (modeling_utils.py, get_extended_attention_mask), so its softmax is, too. That
    of others not: with that the runs of measured_runs.csv on full cards would not have been possible.
    """
    if softmax_is_wide(setup):
        return 4 if weight_bytes(setup) == 4 else 6
    if setup.shape.kind == "bert" and setup.autocasts:
        return 7
    return 2 * weight_bytes(setup) + 1


def softmax_is_wide(setup: Setup) -> bool:
    """modeling_llama.py of transformers and what follows it: softmax(…, dtype=torch.float32).to(query_states.dtype)."""
    return setup.shape.gated_mlp and setup.shape.kind == "decoder" and "transformers" in setup.engine_version


def _scores_again(setup: Setup, tokens: int) -> tuple[Component, ...]:
    """Of one block: with selective recomputation its backward pass makes them again (Korthikanti et al. 2022)."""
    if setup.engine != "megatron" or setup.recompute != "selective" or setup.flash_attention:
        return ()
    size = 5 * setup.shape.heads * setup.seq_len * tokens / setup.tp
    return (part("scores of one block", "5asT/t", size, KORTHIKANTI),)


def _gradients_of_scores(setup: Setup, tokens: int) -> tuple[Component, ...]:
    """Of the softmax's result and of its input, when what the FFN had kept is gone, which comes after attention."""
    if setup.flash_attention or setup.engine == "megatron":
        return ()
    w, shape = weight_bytes(setup), setup.shape
    each = w + max(w, 4) if softmax_is_wide(setup) else 2 * w
    kept = (3 if shape.gated_mlp else 1) * stream_bytes(setup) * shape.ffn / setup.tp
    size = tokens * (each * shape.heads * setup.seq_len / setup.tp - kept)
    if size <= 0:
        return ()
    return (part("gradients of scores", f"{each}asT less what the FFN kept", size, "counted by tensor"),)


def _megatron_block(setup: Setup) -> float:
    """sbh (10 + 24/t) + 5 a s² b / t for f = 4h; all over t with sequence parallelism (Korthikanti et al. 2022).

    Megatron-LM, megatron/training/theoretical_memory_usage.py, has the same terms, and 4 f/h for other widths.
    """
    h, t = setup.shape.hidden, setup.tp
    outer = 10 / t if setup.sequence_parallel else 10
    keeps_scores = not setup.flash_attention and setup.recompute != "selective"
    scores = 5 * setup.shape.heads * setup.seq_len / t if keeps_scores else 0.0
    return h * (outer + (8 + 4 * setup.shape.ffn / h) / t) + scores


def _matrix_outputs_per_token(setup: Setup) -> float:
    """Half of the outputs of the linear layers, and that of attention."""
    outputs = sum(columns for _, columns in setup.shape.linear_shapes.values())
    return weight_bytes(setup) * (outputs / 2 + setup.shape.attention_width) / setup.tp


def _dequantised(setup: Setup) -> tuple[Component, ...]:
    """4-bit weights are unpacked, one matrix at a time."""
    if not setup.quantised:
        return ()
    shape = setup.shape
    largest = max(rows * columns for rows, columns in shape.linear_shapes.values())
    return (part("one matrix, dequantised", "2 × largest", 2 * largest, "bitsandbytes/autograd/_functions.py"),)


def _dequantised_prompt(setup: Setup) -> tuple[Component, ...]:
    """Of several tokens at once, bitsandbytes multiplies by the dequantised matrix; other kernels unpack as they go."""
    if setup.precision not in ("nf4", "nf4_dq", "int8"):
        return ()
    return (*_dequantised(setup), *_dequantised_head(setup))


def _dequantised_head(setup: Setup) -> tuple[Component, ...]:
    if not (setup.quantised and quantises_the_head(setup)):
        return ()
    size = 2 * setup.shape.embedding_parameters
    return (part("the head, dequantised", "2Vh", size, "bitsandbytes/autograd/_functions.py"),)


def _logits(setup: Setup, constants: MemoryConstants) -> tuple[Component, ...]:
    """At the start of the backward pass: logits, copies of other types and shape, log-softmax, gradient."""
    each, source = _bytes_of_a_logit(setup, constants)
    if not each:
        return ()
    tokens = setup.tokens
    parallel = "/t" if setup.tp > 1 else ""
    return (part("logits", f"{each:g}TV{parallel}", each * tokens * setup.shape.vocab / setup.tp, source),)


def _bytes_of_a_logit(setup: Setup, constants: MemoryConstants) -> tuple[float, str]:
    if setup.mode in ("infer", "reward"):
        return 0.0, "of the last token alone"
    if setup.cut_cross_entropy:
        return 0.0, "Wijmans et al. 2024: tile by tile, in one kernel"
    if setup.fused_cross_entropy:
        return constants.logits_fused, FITTED
    if setup.engine == "fsdp" and not _compiles_its_loss(setup):
        return constants.logits_sharded, FITTED
    if setup.engine == "megatron":
        return constants.logits_megatron, FITTED
    if setup.engine == "fsdp":
        return constants.logits_half, FITTED
    if setup.engine_version.startswith("ms-swift"):
        return constants.logits_metrics, FITTED
    if shifts_labels(setup):
        return stream_bytes(setup) + LOGITS_ONCE, "transformers/loss/loss_utils.py, counted"
    if setup.engine == "none" or setup.precision == "fp32":
        return constants.logits_autocast, FITTED
    if setup.engine == "deepspeed" and _model_upcasts(setup):
        return constants.logits_upcast, FITTED
    return constants.logits_half, FITTED


def shifts_labels(setup: Setup) -> bool:
    return setup.transformers_version >= SHIFTS_LABELS


def _model_upcasts(setup: Setup) -> bool:
    """Models of the Llama family in transformers make all logits fp32 from 4.31 of July 2023 on (modeling_llama.py).

    Of what the software says of itself the first counts: its version of transformers, of DeepSpeed, of torch, its date.
    """
    if not setup.shape.gated_mlp or setup.shape.kind != "decoder":
        return False
    if setup.transformers_version:
        return setup.transformers_version >= WIDENS_LOGITS
    if deepspeed_version(setup):
        return deepspeed_version(setup) >= (0, 10)
    if setup.torch_version != (0, 0):
        return setup.torch_version >= (2, 1)
    date = re.search(r"20\d\d-\d\d", setup.engine_version)
    return date is None or date.group() >= "2023-07"


def logits_beyond(setup: Setup, passing: tuple[Component, ...], constants: MemoryConstants) -> int:
    """Bytes that logits may take on top, by the model's code.

    In training older code of Llama's and GLM's kind may make half logits fp32, too, and a program's own loss may shift
    fp32 ones, which is a copy.
    """
    if setup.mode == "infer":
        return beyond_the_prompt(setup)
    if shifts_labels(setup) and widens_embeddings(setup):
        return 4 * sum(c.bytes for c in passing if c.name == "logits") // round(stream_bytes(setup) + LOGITS_ONCE)
    upcasts = setup.shape.gated_mlp or setup.shape.kind == "glm"
    if setup.engine != "deepspeed" or not upcasts or setup.precision == "fp32" or setup.fused_cross_entropy:
        return 0
    if _model_upcasts(setup):
        return 0  # counted already
    logits = sum(component.bytes for component in passing if component.name == "logits")
    return round(logits * (constants.logits_upcast / constants.logits_half - 1))


def _compiles_its_loss(setup: Setup) -> bool:
    return setup.compiled and setup.engine_version.startswith("torchtitan 2025")
