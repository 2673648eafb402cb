"""Losses that methods share."""
