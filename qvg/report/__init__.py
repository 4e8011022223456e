"""Output for users: plans, charts, and the similarity of two videos."""
