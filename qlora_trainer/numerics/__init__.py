"""Arithmetic over tensors: torch and nothing else; each function names its paper."""
