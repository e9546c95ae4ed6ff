"""Folders of weights as Hugging Face's libraries write and read them: files, and rules that tie them to parameters."""
