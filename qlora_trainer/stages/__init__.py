"""One module or folder per step of a run; none imports another."""
