"""``ratchet bench encode``: embeddings a second, compared with other servers and with the model alone.

``run_encode`` is the benchmark; ``grid`` defines the measurements; ``payloads`` and ``generator`` make the load;
``sides`` are the systems under test; ``peers`` are the other servers; ``figures`` computes ratios.
"""
