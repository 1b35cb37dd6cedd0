"""HTTP: the OpenAI-shaped routes, their bodies and errors. Only this folder knows status codes."""
