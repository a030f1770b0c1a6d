"""Trains without a GPU: a CPU platform and a Hugging Face rollout server, both of which verl lacks."""
