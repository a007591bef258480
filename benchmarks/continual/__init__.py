"""A benchmark of learning on a stream, after FoMo-in-Flux ("A Practitioner's Guide to Continual Multimodal
Pretraining", Roth et al. 2024), on the data that package registries ship.

`stream` says what is learned and what is asked, `chain` runs one method along one order, `runner` runs many of them in
processes of their own (`worker`), `metrics` and `intervals` make figures of the outcomes, `report`, `table` and `plots`
show them.
"""
