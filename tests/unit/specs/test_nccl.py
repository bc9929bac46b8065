"""Warnings about NCCL settings, for the versions in the image and the fabric of the cluster."""

from __future__ import annotations

import pytest

BMTRAIN = """\
name: demo
cluster: nine-g
profile: lora-8x80g
model: cpm-100b
image: cpmlive-flash:0.0.4
engine: bmtrain
data: {train: rows.jsonl}
training: {precision: fp16}
"""
TORCH = """\
name: demo
cluster: h100
profile: lora-8x80g
model: cpm-100b
image: modern
data: {train: rows.jsonl}
env: {NCCL_SOCKET_IFNAME: ib0}
"""


def warnings(load, job, **env):
    settings = ", ".join(f"{name}: '{value}'" for name, value in env.items())
    return list(load(job, f"env={{{settings}}}").warnings)


@pytest.mark.parametrize(
    ("name", "value", "warning"),
    [
        ("NCCL_TIMEOUT", "1800", "env.NCCL_TIMEOUT: is in many public scripts, but NCCL has no such variable"),
        (
            "NCCL_SOCKET_IFNAM",
            "eth0",
            "env.NCCL_SOCKET_IFNAM: is not a variable of NCCL (did you mean NCCL_SOCKET_IFNAME?)",
        ),
        ("NCCL_WARP_SPEED", "9", "env.NCCL_WARP_SPEED: is not a variable of NCCL"),
        ("NCCL_IB_GDR_LEVEL", "PIX", "env.NCCL_IB_GDR_LEVEL: is called NCCL_NET_GDR_LEVEL since NCCL 2.4.0"),
        ("NCCL_MIN_NCHANNELS", "4", "env.NCCL_MIN_NCHANNELS: is deprecated since NCCL 2.17; use NCCL_MIN_CTAS"),
        (
            "NCCL_IB_HCA",
            "mlx5_0,mlx5_1",
            "env.NCCL_IB_HCA: names are prefixes, so mlx5_1 also means mlx5_10…; start the list with =",
        ),
    ],
)
def test_a_setting_that_does_not_do_what_it_seems_to(load, name, value, warning):
    assert warnings(load, BMTRAIN, **{name: value}) == [warning]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_DEBUG", "INFO"),
        ("NCCL_IB_HCA", "=mlx5_0,mlx5_1"),
        ("NCCL_IB_HCA", "^=mlx5_1"),
        ("NCCL_IB_HCA", "mlx5_10,mlx5_11"),
        ("NCCL_IB_GID_INDEX", "3"),  # NCCL 2.14 of the image does not choose by itself
        ("NCCL_FASTRAK_CTRL_DEV", "eth0"),  # of a plug-in
        ("NCCLX", "1"),
        ("OMP_NUM_THREADS", "4"),
    ],
)
def test_a_setting_that_is_as_it_should_be(load, name, value):
    assert warnings(load, BMTRAIN, **{name: value}) == []


def test_the_version_in_the_image_decides_about_the_gid_index(load):
    assert warnings(load, TORCH, NCCL_IB_GID_INDEX="3") == [
        "env.NCCL_IB_GID_INDEX: NCCL 2.21 and newer choose the GID themselves; remove it"
    ]


def test_switching_off_what_the_cluster_has_is_a_warning(load):
    assert warnings(load, BMTRAIN, NCCL_IB_DISABLE="1", NCCL_P2P_DISABLE="1") == [
        "env.NCCL_IB_DISABLE: nine-g has InfiniBand; this sends all traffic over sockets",
        "env.NCCL_P2P_DISABLE: the GPUs have NVLink; this sends their traffic through host memory",
    ]
    assert warnings(load, BMTRAIN, NCCL_IB_DISABLE="0", NCCL_P2P_DISABLE="0") == []
    assert warnings(load, TORCH, NCCL_IB_DISABLE="1") == []  # h100 states no InfiniBand


def test_a_cluster_that_says_it_has_no_nvlink_is_believed(load, tmp_path, catalogue):
    text = (catalogue.folders[0] / "clusters/nine-g.yaml").read_text()
    (tmp_path / "pcie.yaml").write_text(text + "nvlink: false\n")

    assert warnings(load, BMTRAIN.replace("nine-g", "./pcie.yaml"), NCCL_P2P_DISABLE="1") == []


def test_settings_of_the_cluster_are_looked_at_as_well_and_named_by_their_file(load, tmp_path, catalogue):
    text = (catalogue.folders[0] / "clusters/nine-g.yaml").read_text()
    (tmp_path / "site.yaml").write_text(text.replace("NCCL_IB_TIMEOUT", "NCCL_IB_TIMEOUTS"))

    assert warnings(load, BMTRAIN.replace("nine-g", "./site.yaml")) == [
        "cluster.env.NCCL_IB_TIMEOUTS (site.yaml:20:25): is not a variable of NCCL (did you mean NCCL_IB_TIMEOUT?)"
    ]


def test_a_setting_of_the_cluster_that_the_job_repeats_is_the_jobs(load, tmp_path, catalogue):
    text = (catalogue.folders[0] / "clusters/nine-g.yaml").read_text()
    (tmp_path / "site.yaml").write_text(text.replace("NCCL_IB_TIMEOUT: 22", "NCCL_IB_DISABLE: 1, NCCL_P2P_DISABLE: 1"))

    job = BMTRAIN.replace("nine-g", "./site.yaml")
    assert warnings(load, job, NCCL_P2P_DISABLE="1") == [
        "cluster.env.NCCL_IB_DISABLE (site.yaml:20:24): ./site.yaml has InfiniBand;"
        " this sends all traffic over sockets",
        "env.NCCL_P2P_DISABLE: the GPUs have NVLink; this sends their traffic through host memory",
    ]


def test_the_torch_in_the_image_decides_how_its_variables_are_called(load):
    job = BMTRAIN.replace("bmtrain", "torch")

    assert warnings(load, job, TORCH_NCCL_BLOCKING_WAIT="1") == [
        "env.TORCH_NCCL_BLOCKING_WAIT: torch 1.13 of the image reads NCCL_BLOCKING_WAIT (new names since 2.2)"
    ]
    assert warnings(load, TORCH, TORCH_NCCL_BLOCKING_WAIT="1") == []


def test_bmtrain_does_not_read_the_variables_of_torch(load):
    assert warnings(load, BMTRAIN, TORCH_NCCL_BLOCKING_WAIT="1")[-1] == (
        "env: BMTrain calls NCCL itself, so TORCH_NCCL_* variables do nothing for it"
    )


def test_what_the_image_sets_unseen_is_told_unless_the_job_or_cluster_sets_it(load):
    job = TORCH.replace("env: {NCCL_SOCKET_IFNAME: ib0}\n", "")

    assert load(job).warnings == (
        "env.NCCL_SOCKET_IFNAME: the image sets it to eth0; write it here if that is not the cluster's",
    )
    assert load(TORCH).warnings == ()
