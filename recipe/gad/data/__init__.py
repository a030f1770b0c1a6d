"""The teacher's answers and the training files: prompts -> ``collect`` -> ``prepare`` -> train and val parquet."""
