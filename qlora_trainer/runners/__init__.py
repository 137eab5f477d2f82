"""Runtimes that load an exported file, and forward passes through what they loaded."""
