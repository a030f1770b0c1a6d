"""``gad eval``: sample answers -> score them -> compare models."""
