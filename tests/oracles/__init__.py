"""Slow restatements from the papers that the package is compared with; nothing here is imported from it."""
