"""The chart's pods as processes on one machine: what Kubernetes and KubeRay would start, from what Helm renders.

Needs Linux, root and util-linux: a pod has a network of its own, a container a root that it may not write to.
"""
