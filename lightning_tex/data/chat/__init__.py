"""Conversations: rows of fine-tuning data, chat templates, and which of the tokens are answers."""
