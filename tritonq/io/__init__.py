"""Checkpoints: quantized from file to file, and written from memory, in layouts that others load."""
