"""GAD (Generative Adversarial Distillation, arXiv 2511.10643): configuration, plugin and user tools."""
