"""A decoder behind an HTTP endpoint that OpenAI's clients speak to (extra ``serve``): `linnet serve`.

:mod:`.batching` decodes for many requests at once and knows nothing of the web; :mod:`.app` is the endpoint.
"""
