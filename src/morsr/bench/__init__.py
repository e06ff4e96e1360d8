"""Measurements as ratios against a named peer, run by `morsr bench`."""
