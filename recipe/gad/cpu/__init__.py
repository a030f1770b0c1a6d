"""What verl lacks to train without a GPU: a platform and a Hugging Face rollout server."""
