"""Serving a mixture-of-experts model from a group that grows, shrinks and survives deaths while it serves.

`router` is the front end: it starts and stops the processes that are ranks and gives them requests. `worker` is one
such process; it runs `program` on the rows of `rows`, with a `model`.
"""
