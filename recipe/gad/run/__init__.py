"""What a training run and the tools share: configuration, findings, checks, checkpoints, data file, log.

Imports nothing of ``verl/`` and nothing of another wing; a test enforces that. The one exception is the check of the
plugin.
"""
