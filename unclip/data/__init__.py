"""Captioned pictures: the built-in shapes world and its oracle, and the user's own files."""
