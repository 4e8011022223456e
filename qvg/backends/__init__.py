"""Which implementation does an op, and what kept a faster one away."""
