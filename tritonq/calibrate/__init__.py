"""Calibrated quantization, block by block."""
