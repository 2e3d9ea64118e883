"""Serving: an inference server for trained models, whose code runs in an environment of its own."""
