"""The environment of a run: devices, processes, progress reports, and where large tensors are kept."""
