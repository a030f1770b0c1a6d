"""What the trainer computes without Ray or a model: the teacher's trajectory and the rows of one GAD step."""
