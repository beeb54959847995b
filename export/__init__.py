"""What is done with a trained detector: exported files compared and timed."""
