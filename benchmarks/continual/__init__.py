"""A benchmark of learning on a stream, after FoMo-in-Flux ("A Practitioner's Guide to Continual Multimodal
Pretraining", Roth et al. 2024), on the data that package registries ship.

`stream` defines training data and suites, `chain` runs one method along one order, `runner` runs many of them in
`worker` processes, `metrics` and `intervals` compute figures from the outcomes, `report`, `table` and `plots` show
them.
"""
