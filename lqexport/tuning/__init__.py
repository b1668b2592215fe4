"""End-to-end tuning of the stored scales and norms."""
