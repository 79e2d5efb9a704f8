"""What was measured: schemas, readers and writers, studies, splits, simulated recordings."""
