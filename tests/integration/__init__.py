"""A package, so that pytest ends the fixtures of scope "package" after the last test of this folder."""
