"""What a run computes on and with: devices, processes, progress, and where large tensors are kept."""
