"""One module per file format: how weights or adapters are stored, written and read back."""
