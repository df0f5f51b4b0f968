"""Trains the label-enhancement screener. Needs torch; the runtime never imports it."""
