"""Talking with a generation system about pictures."""
