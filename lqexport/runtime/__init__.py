"""The environment of a run: devices, processes, progress, the reach of the hub, and where large tensors are kept."""
