"""Rows of a task to token ids, labels, batches and scores; knows no model and no recipe."""
