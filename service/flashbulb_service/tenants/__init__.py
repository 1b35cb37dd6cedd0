"""Who may use the service, and how much of it: API keys, their limits and what they used. Knows no HTTP."""
