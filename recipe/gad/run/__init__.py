"""What a training run and the tools that read it share: configuration, findings, checks, checkpoints, data file, log.

Imports nothing of ``verl/`` and nothing of another wing; a test holds that.
"""
