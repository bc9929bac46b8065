"""Shapes that several tests plan with, from the models' published configurations."""

from __future__ import annotations

from cpm_cluster.planner.setup import Shape

CHATGLM_6B = Shape(
    hidden=4096,
    layers=28,
    heads=32,
    kv_heads=32,
    ffn=16384,
    vocab=150528,
    gated_mlp=False,
    tied_embeddings=True,
    kind="glm",
)
