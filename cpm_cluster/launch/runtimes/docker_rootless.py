"""Rootless Docker: the same client, a daemon of the user's own; container root is the user on disk."""

from __future__ import annotations

from cpm_cluster.launch.runtimes.docker import run_argv, run_options, shell_argv

__all__ = ["run_argv", "run_options", "shell_argv"]
