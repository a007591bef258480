"""``ratchet bench encode``: embeddings a second, beside other servers and beside the model alone.

Ratchet, the peers and the model without a server run on the same cores and are asked in turns, in one run.
``command`` is the benchmark; ``grid`` says what is measured; ``payloads`` and ``generator`` make the load; ``sides``
are what is asked; ``peers`` are the other servers; ``figures`` turns measurements into ratios.
"""
