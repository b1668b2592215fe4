"""What a run will do and cost, decided before any work."""
