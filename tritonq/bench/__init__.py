"""Kernels against a copy and against peers, on a GPU; `command.execute` is what the command line calls."""
