"""Parameter groups, the optimizer and learning-rate schedules."""
