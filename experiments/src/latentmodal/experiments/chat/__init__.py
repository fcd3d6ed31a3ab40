"""Talking with a generation system about pictures."""

from latentmodal.experiments.chat.session import ChatSession

__all__ = ["ChatSession"]
