"""What a person is shown: plans, charts, and how alike two videos are."""
