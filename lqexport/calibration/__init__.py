"""Calibration: token sequences, and the second moments of every linear's inputs."""
