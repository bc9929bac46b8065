"""Model architectures, as in a config.json: never "7B"."""

from __future__ import annotations

from dataclasses import dataclass

from cpm_cluster.specs.fields import Boolean, Choice, Integer, Number, Text, key

LORA_TARGETS = ("project_q", "project_k", "project_v", "attention_out", "w_0", "w_1", "w_out")


@dataclass(frozen=True, kw_only=True)
class Model:
    """The shape of a transformer."""

    layers: int = key(Integer(1, 10_000), "number of transformer layers (of a T5: encoder + decoder)")
    hidden: int = key(Integer(1, 1_000_000), "hidden size")
    heads: int = key(Integer(1, 100_000), "attention heads")
    ffn: int = key(Integer(1, 10_000_000), "width of one feed-forward branch")
    vocab: int = key(Integer(1, 10_000_000), "rows of the embedding")
    kv_heads: int | None = key(Integer(1, 100_000), "key/value heads (grouped-query attention); default: heads", None)
    head_dim: int | None = key(Integer(1, 10_000), "size of a head; default: hidden / heads", None)
    gated_mlp: bool = key(Boolean(), "three feed-forward matrices (SwiGLU, GEGLU) instead of two", True)
    tied_embeddings: bool = key(Boolean(), "the output head shares the embedding", False)
    norm_eps: float = key(Number(1e-20, 1), "epsilon of the norms", 1e-5)
    rope_theta: float = key(Number(1, 1e12), "base of the rotary embedding", 10_000.0)
    block: str = key(Choice(("cpm9g", "decoder", "glm", "t5", "bert")), "block layout; ours trains cpm9g", "cpm9g")
    parameters_stated: float | None = key(
        Number(0, 1e9), "parameters in 10^9, as its publisher or a count states", None
    )
    assumed: str | None = key(
        Text(max_length=600), "set where dimensions are our documented choice, not the publisher's: says which", None
    )
    source: str = key(Text(max_length=400), "where the dimensions are from", "")

    @property
    def attention_width(self) -> int:
        return self.heads * self.size_of_head

    @property
    def size_of_head(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def key_value_heads(self) -> int:
        return self.kv_heads or self.heads

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(in, out) of each linear layer in one block, by its CPM-9G name."""
        kv_width = self.key_value_heads * self.size_of_head
        shapes = {
            "project_q": (self.hidden, self.attention_width),
            "project_k": (self.hidden, kv_width),
            "project_v": (self.hidden, kv_width),
            "attention_out": (self.attention_width, self.hidden),
            "w_0": (self.hidden, self.ffn),
            "w_1": (self.hidden, self.ffn),
            "w_out": (self.ffn, self.hidden),
        }
        if not self.gated_mlp:
            del shapes["w_1"]
        return shapes

    @property
    def parameters(self) -> int:
        """All parameters of a decoder with RMSNorm and no biases (biases and positions of others: below 1 %)."""
        block = sum(rows * columns for rows, columns in self.linear_shapes().values()) + 2 * self.hidden
        embeddings = self.vocab * self.hidden * (1 if self.tied_embeddings else 2)
        return self.layers * block + embeddings + self.hidden
