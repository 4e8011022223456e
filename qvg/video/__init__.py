"""Video chunk by chunk: the sampling loop, prompts over time, sessions on disk, frames to a file."""
