"""The CPU quickstart: its problem and its report."""
