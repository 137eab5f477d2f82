"""The machine and the run folder: devices, memory, files, checkpoints, tracking, and the door to bitsandbytes."""
