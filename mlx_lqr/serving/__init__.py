"""Answers over HTTP: an engine that decodes many requests at once, and a server with OpenAI's interface."""
