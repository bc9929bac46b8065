"""Whether the GPU and the image have what the job computes with."""

from __future__ import annotations

from collections.abc import Iterator

from cpm_cluster.specs.checks.rules import Finding, reads
from cpm_cluster.specs.job import JobSpec
from cpm_cluster.specs.values import version_tuple


@reads("training", "engine", "resources")
def _gpu_features(spec: JobSpec) -> Iterator[Finding]:
    gpu, training = spec.gpu, spec.training
    if gpu is None or not spec.resources.gpus_per_node or spec.engine == "command":
        return
    if training.precision == "bf16" and not gpu.has_bf16:
        bf16 = "bf16" if "training.precision" in spec.origins else "bf16 (the default)"
        yield (
            "training.precision",
            f"{bf16} needs an Ampere GPU or newer (sm_80); {gpu.product} is sm_{gpu.sm}: write fp16",
        )
    if training.attention == "flash" and gpu.sm < 80:
        yield (
            "training.attention",
            f"flash-attention 2 needs an Ampere GPU or newer (sm_80); {gpu.product} is sm_{gpu.sm}: write sdpa",
        )


@reads("image", "engine", "training", "resources", "cluster")
def _image_fits(spec: JobSpec) -> Iterator[Finding]:
    image, gpu = spec.image, spec.gpu
    if image is None:
        return
    if gpu and image.gpu and image.sm and spec.resources.gpus_per_node and not image.runs_on(gpu.sm):
        codes = ", ".join(f"sm_{code}" for code in image.sm)
        cuda = f" (CUDA {image.cuda})" if image.cuda else ""
        yield (
            "image",
            f"{image.tag}{cuda} has no code for {gpu.product} (sm_{gpu.sm}), only for {codes}; name another image",
        )
    if spec.engine == "bmtrain" and image.bmtrain is None:
        yield "engine", f"bmtrain is not in {image.tag}; write torch, or name an image that has it"
    if spec.engine == "deepspeed" and image.deepspeed is None:
        yield "engine", f"deepspeed is not in {image.tag}; write torch, or name an image that has it"
    if spec.engine == "bmtrain" and spec.training.precision == "bf16" and version_tuple(image.bmtrain)[:1] == (0,):
        yield (
            "training.precision",
            f"BMTrain {image.bmtrain} in {image.tag} knows fp16 only (bf16 since 1.0): write fp16",
        )
    on_old_gpu = gpu is not None and gpu.sm < 80  # has been said
    if spec.engine != "command" and spec.training.attention == "flash" and not image.flash_attn and not on_old_gpu:
        yield "training.attention", f"flash-attn is not in {image.tag}; write sdpa, or auto: the best there is"
    needed, have = version_tuple(image.min_driver), version_tuple(spec.cluster.driver)
    if needed and have and have < needed and spec.resources.gpus_per_node:
        yield (
            "image",
            f"{image.tag} needs NVIDIA driver {image.min_driver} or newer; {spec.cluster_name} has"
            f" {spec.cluster.driver}; name an older image",
        )
