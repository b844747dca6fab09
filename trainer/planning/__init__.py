"""What a training step needs, before anything is allocated: memory by part, bytes between GPUs, time."""
