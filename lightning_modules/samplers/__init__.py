"""Samplers: chains that draw from an energy."""
