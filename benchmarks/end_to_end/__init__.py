"""Whole training steps, whole generations, and whole runs on real data."""
