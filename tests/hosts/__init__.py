"""Quantized models under host libraries as they are released, unpatched: which modes work, which are refused.

`registry` holds what a mode is and what has to hold for it, `*_modes` the modes of one library each, `page` writes
docs/hosts.md from them. `tests/test_hosts.py` runs every mode.
"""
