"""Grafana dashboards: the JSON files in ``json/`` are what Grafana reads, and the source.

Edit a panel in its file; or in Grafana, on a copy of the dashboard, and export it for sharing externally: then it asks
for the data source. Tests check that a panel has a description and a unit, and that each query names metrics and labels
that :mod:`core.metrics.declared` has.
"""
