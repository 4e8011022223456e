"""What is kept of a run, in how many bits and for how long; and the forecast of it."""
