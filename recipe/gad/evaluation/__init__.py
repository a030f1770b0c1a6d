"""``gad eval``: sampling (answers.jsonl) -> text_metrics, two_sample, judge -> scores (scores.json, comparison)."""
