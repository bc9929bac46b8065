"""What generation holds beside the weights: the key/value cache, and what a prompt takes that is read at once.

Symbols: T tokens of a batch of prompts, s length of one, h hidden, f FFN width, a heads, V vocabulary. Read in
transformers: generation/utils.py, models/llama/modeling_llama.py, cache_utils.py of the versions named.
"""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.planner.fit import Component
from cpm_cluster.planner.setup import Setup
from cpm_cluster.planner.stages import Stage
from cpm_cluster.planner.states import part, weight_bytes

KEEPS_ONE_LOGIT = (4, 45)  # num_logits_to_keep: before it, generate computed the logits of the whole prompt
GROWS_IN_PLACE = (4, 36)  # DynamicCache: before it, a step held all keys and values of the step before as well
WIDENS_LOGITS = (4, 31)  # models of the Llama family make all logits fp32 from then on


@dataclass(frozen=True)
class Generation:
    """Components by when they are there; the cache alone where no version says that prompts are read whole."""

    cache: tuple[Component, ...]
    block: tuple[Component, ...] = ()  # one block, for all tokens of the prompt
    logits: tuple[Component, ...] = ()  # of the prompt, at its end
    second: tuple[Component, ...] = ()  # in the step after it


def generation(setup: Setup, stage: Stage) -> Generation:
    cache = key_value_cache(setup, stage)
    version = setup.transformers_version
    if not version or version >= KEEPS_ONE_LOGIT or setup.shape.kind == "bert":
        return Generation(cache)
    block = (part("one block of the prompt", "T × made by a block", prompt_bytes(setup), "modeling_llama.py, counted"),)
    second: tuple[Component, ...] = ()
    w, wide = weight_bytes(setup), wide_logit_bytes(setup)
    each = setup.tokens * setup.shape.vocab / setup.tp if stage.has_head else 0.0
    logits = (part("logits of the prompt", f"{w + wide}TV", (w + wide) * each, "generation/utils.py before 4.45"),)
    if version < GROWS_IN_PLACE:
        again = [part("the cache before this step", one.formula, one.bytes, "modeling_llama.py, cat") for one in cache]
        kept = part("logits of the prompt", f"{wide or w}TV", (wide or w) * each, "generation/utils.py, outputs")
        second = (*again, kept)
    return Generation(cache, block, logits, second)


def wide_logit_bytes(setup: Setup) -> int:
    """Of the fp32 copy, where the model's code makes one."""
    llama = setup.shape.gated_mlp and setup.shape.kind == "decoder"
    return 4 if llama and weight_bytes(setup) == 2 and setup.transformers_version >= WIDENS_LOGITS else 0


def key_value_cache(setup: Setup, stage: Stage) -> tuple[Component, ...]:
    """Of the blocks of a stage. An encoder generates nothing, and keeps none."""
    if setup.shape.kind == "bert":
        return ()
    each = 2 * weight_bytes(setup)
    size = each * stage.blocks * setup.kv_width * setup.tokens
    return (part("key/value cache", f"{each}T × layers × key width", size, "one key and one value"),)


def prompt_bytes(setup: Setup) -> float:
    """One block for all tokens of a prompt: its input, norm and output, q, k and v, the FFN's branches.

    Without flash attention q, k, v and the scores of all heads instead: masked, as a softmax in fp32, and cast back.
    """
    shape, w, t = setup.shape, weight_bytes(setup), setup.tp
    attention = shape.attention_width / t + 2 * setup.kv_width
    wide = (3 if shape.gated_mlp else 2) * shape.ffn / t
    block = w * (3 * shape.hidden + max(attention, wide))
    scores = 0.0 if setup.flash_attention else 8 * shape.heads * setup.seq_len / t
    return setup.tokens * max(block, w * (2 * shape.hidden + attention) + scores)


def beyond_the_prompt(setup: Setup) -> int:
    """Bytes that may come on top, by the code of the model and of the program.

    Some compute the logits of a whole prompt, in half and fp32, and all that don't cut it into pieces one block of it.
    """
    version = setup.transformers_version
    if version and version < KEEPS_ONE_LOGIT:
        return 0  # counted already
    logits = 0.0 if version else 6 * setup.tokens * setup.shape.vocab / setup.tp
    return round(logits + prompt_bytes(setup))
