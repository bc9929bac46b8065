"""How this machine is read before it is changed for rootless containers."""

from __future__ import annotations

import pytest

from cpm_cluster.sandbox.host_settings import root_is_shared, subordinate_ids

PRIVATE = "27 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n22 27 0:21 / /proc rw shared:5 - proc proc rw\n"
SHARED = "27 1 254:0 / / rw,relatime shared:14 - ext4 /dev/vda rw\n22 27 0:21 / /proc rw - proc proc rw\n"


@pytest.mark.parametrize(
    ("mountinfo", "shared"),
    [
        (PRIVATE, False),
        (SHARED, True),
        # the last mount on a point hides the earlier ones
        (SHARED + "90 27 0:50 / / rw master:14 - overlay overlay rw\n", False),
        (PRIVATE + "90 27 0:50 / / rw shared:9 master:14 - overlay overlay rw\n", True),
    ],
)
def test_whether_the_root_is_a_shared_mount(mountinfo, shared):
    assert root_is_shared(mountinfo) is shared


@pytest.mark.parametrize(
    ("table", "count"),
    [
        ("", 0),
        ("other:100000:65536\n", 0),
        ("cpm-sandbox:100000:65536\n", 65536),
        ("1001:100000:65536\n", 65536),
        ("cpm-sandbox:100000:1000\nother:1:2\ncpm-sandbox:200000:2000\n", 3000),
        ("# a comment\ncpm-sandbox:100000\n", 0),
    ],
)
def test_how_many_subordinate_ids_a_user_has(table, count):
    assert subordinate_ids(table, "cpm-sandbox", 1001) == count
