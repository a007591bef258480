# syntax=docker/dockerfile:1
# Ratchet in two images from one base: `docker build --target cpu -t ratchet:cpu .`, and gpu likewise.
# The CUDA libraries come with PyTorch's wheels, so the GPU image needs no other base; the driver is the host's.
ARG PYTHON=3.11-slim-bookworm

FROM scratch AS source
COPY pyproject.toml README.md LICENSE NOTICE /src/
COPY client /src/client
COPY core /src/core
COPY demo /src/demo
COPY ops /src/ops
COPY streams /src/streams
COPY serving /src/serving
COPY updater /src/updater

FROM python:${PYTHON} AS build
WORKDIR /src
COPY locks locks

# Exactly what the locks name, by digest (`make lock`), and before the source: a change of ours installs nothing again.
# PyTorch's builds for processors are only in PyTorch's own index.
FROM build AS build-cpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --extra-index-url https://download.pytorch.org/whl/cpu --require-hashes --no-deps --requirement locks/cpu.txt
COPY --from=source /src ./
RUN sh locks/finish.sh

FROM build AS build-gpu
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --no-deps --requirement locks/gpu.txt
COPY --from=source /src ./
RUN sh locks/finish.sh

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

# No compiler: on a processor nothing is compiled when vLLM starts (serving/engines/vlm/vllm_start.py).
FROM run AS cpu
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends libnuma1 \
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
