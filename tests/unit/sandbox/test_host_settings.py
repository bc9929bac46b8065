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
    ("table", "ids"),
    [
        ("", []),
        ("other:100000:65536\n", []),
        ("cpm-sandbox:100000:65536\n", [range(100000, 165536)]),
        ("1001:100000:65536\n", [range(100000, 165536)]),
        ("cpm-sandbox:10:1\nother:1:2\ncpm-sandbox:20:2\n", [range(10, 11), range(20, 22)]),
        ("# a comment\ncpm-sandbox:100000\n", []),
    ],
)
def test_which_subordinate_ids_a_user_has(table, ids):
    assert subordinate_ids(table, "cpm-sandbox", 1001) == ids
