"""`flashbulb bench serve`: an open-loop load generator for any server in the shape of OpenAI's images API.

    arrivals ─► workload ─► openloop (aiohttp) ─► validity ─► report ─► JSON, table, plot

It knows nothing of our queue or workers: it sees a server as its clients do.
"""
