"""The teacher's answers and the training files: prompts -> ``collect`` -> ``prepare`` -> train and val parquet.

The defaults of both steps stand here, where the command line can read them without loading pyarrow.
"""

SAMPLES = 1
"""Answers per prompt."""
CONCURRENCY = 16
"""Requests in flight."""
VAL_FRACTION = 0.01
"""Share of the prompts that go to validation."""
