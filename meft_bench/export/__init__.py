"""Runs and tasks in the form of other people's comparisons, so that users find MEFT where they compare methods."""
