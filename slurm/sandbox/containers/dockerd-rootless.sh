#!/bin/sh
# Docker's script for a rootless daemon, which Debian keeps where no PATH leads; dockerd and runc are in folders for
# system programs, which an ordinary user's PATH may lack.
export PATH="$$PATH:/usr/sbin:/sbin"
exec ${rootless_script} "$$@"
