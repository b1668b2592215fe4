"""Folders for mlx-lm: which models it runs, the plan, the writer, the reader."""
