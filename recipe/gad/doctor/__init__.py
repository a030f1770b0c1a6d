"""``gad doctor``: slower checks before a run, and the estimate of its GPU memory."""
