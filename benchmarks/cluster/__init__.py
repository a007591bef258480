"""The chart's pods as processes on one machine: what Kubernetes and KubeRay would start from Helm's output.

Needs Linux, root and util-linux: each pod has its own network, each container a read-only root.
"""
