"""Conversations: files of them, their rows, and the chat templates that make tokens of them."""
