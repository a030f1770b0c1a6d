"""``gad referee``: training recipes compared at equal teacher batches, over several seeds, on one page."""
