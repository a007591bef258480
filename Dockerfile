# syntax=docker/dockerfile:1
# Ratchet in two images from one base: `docker build --target cpu -t ratchet:0.1.0-cpu .`, and gpu likewise.
# The CUDA libraries come with PyTorch's wheels, so the GPU image needs no other base; the driver is the host's.
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE NOTICE ./
COPY ops ops
COPY streams streams
COPY serving serving
COPY updater updater
COPY benchmarks benchmarks

# vLLM's CPU build asks for PyTorch's CPU build, which only PyTorch's own index has. torchaudio and torchcodec are pulled
# by vLLM, are of no use here, and their CUDA builds fail to import without CUDA. Versions are in pyproject.toml.
FROM build AS build-cpu
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu '.[local,postgres,registry,s3,vlm-cpu]' \
    && pip uninstall --yes torchaudio torchcodec

FROM build AS build-gpu
# hadolint ignore=DL3013
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install '.[local,postgres,registry,s3,gpu]' \
    && pip uninstall --yes torchaudio torchcodec

# Everything lies in /usr/local, not in a virtual environment: KubeRay starts Ray from a login shell, which resets PATH.
FROM python:${PYTHON} AS run
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    RATCHET_HOME=/var/lib/ratchet
RUN groupadd --gid 10001 ratchet \
    && useradd --uid 10001 --gid ratchet --create-home --home-dir /home/ratchet --shell /usr/sbin/nologin ratchet \
    && install --directory --owner ratchet --group ratchet --mode 0750 /var/lib/ratchet /run/ratchet
WORKDIR /var/lib/ratchet
EXPOSE 8000 8001 9464 9465 9466
ENTRYPOINT ["ratchet"]
CMD ["serve"]
# Of `ratchet serve`; the other parts have their own checks where they are started (compose.yaml, the chart).
HEALTHCHECK --interval=30s --timeout=15s --start-period=5m --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health/live', timeout=12)"]

# vLLM on a processor compiles parts of a model with TorchInductor when it starts, so this image has a C++ compiler.
FROM run AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-cpu /usr/local /usr/local
USER 10001:10001

# Triton compiles its kernels' launchers when vLLM starts, so this image has a C compiler.
FROM run AS gpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libnuma1 \
    && rm -rf /var/lib/apt/lists/*
COPY --from=build-gpu /usr/local /usr/local
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
